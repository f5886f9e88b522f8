// See prefill.cpp.
#pragma once
#include <vector>

#include "decode.h"
#include "tiles.h"

namespace prunus {

class Prefill {
  public:
    // Tiles that go through the layers together: lists of kept weights are made once for all of them.
    static constexpr int64_t BATCH = 4;

    explicit Prefill(Model& model) : model_(model) {}
    bool allocate();
    // At most BATCH tiles of tokens at the model's position. `logits`: null, of the last token, or of every one.
    Status run(const int64_t* tokens, int64_t count, float* logits, bool every);

  private:
    struct Own {
        ListSpace lists;
        Buffer cos, sin;
    };

    void work(int thread);
    void embed(int thread);
    void normalise(int thread, const Buffer& x, const float* weight, float eps, Buffer& out);
    void add(int thread, const Buffer& change, const float* norm, float eps);
    void apply(int thread, const Matrix& matrix, const Matrix* before, const float* bias, const Buffer& x, float* y);
    void tables(Own& own, const LayerPlan& layer, int64_t tile);
    void append(int thread, const LayerPlan& layer);
    void attention(int thread, const LayerPlan& layer);
    void last_logits(int thread);
    void all_logits(int thread);
    void finish(int64_t tile, int64_t first, int64_t last, int64_t count);
    void barrier();
    void part(int64_t size, int thread, int64_t& first, int64_t& last) const;

    Model& model_;
    std::vector<Own> threads_;
    Buffer hidden_, normed_, gathered_, qkv_, mixed_, gate_, up_, scores_;  // [tiles, rows, 64]
    const int64_t* tokens_ = nullptr;
    int64_t count_ = 0, tiles_ = 0;
    float* logits_ = nullptr;
    bool every_ = false;
};

}  // namespace prunus
