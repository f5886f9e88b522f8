// A transformer of the Llama kind: one token through all layers in one parallel region.
#pragma once
#include <initializer_list>
#include <memory>
#include <vector>

#include "activations.h"
#include "pool.h"

namespace prunus {

// Read by number from Python; keep in step with runtime/native.py.
struct LayerPlan {
    const Matrix *q, *k, *v, *o, *gate, *up, *down;
    const float *q_bias, *k_bias, *v_bias, *o_bias, *gate_bias, *up_bias, *down_bias;
    // Norm weights, the offset of 1 that some models add included. post_*: of what goes to the residual; may be null.
    const float *attention_norm, *post_attention_norm, *mlp_norm, *post_mlp_norm, *q_norm, *k_norm;
    const float *cos, *sin;  // [context, rotary]
    int64_t heads, kv_heads, head_dim, rotary, window;  // window: positions seen, itself included; 0 = all
    float norm_eps, qk_eps, scale, softcap;
    int32_t activation;
    int32_t reserved;
};

struct ModelPlan {
    const LayerPlan* layers;
    int64_t layer_count, hidden, vocabulary, context;
    const Matrix *embedding, *head;
    const float* norm;  // of the last hidden state
    const float* head_bias;
    float norm_eps, embedding_scale, logit_softcap, reserved;
};

// Everything that one thread writes: no two threads write the same memory between two barriers.
struct Scratch {
    Buffer hidden, normed, scores, query;
    Activations activations;
};

// y = matrix x + bias.
struct Linear {
    const Matrix& matrix;
    const float* bias;  // may be null
    float* y;
};

class Prefill;

class Model {
  public:
    Status build(const ModelPlan& plan, const Kernels& kernels, Pool& pool);
    // Token at the next position; `logits` [vocabulary] or null. Returns OK, TOO_LONG or BAD_TOKEN.
    Status step(int64_t token, float* logits);
    // Tokens after one another; `logits`: null, of the last token, or of every one.
    Status prefill(const int64_t* tokens, int64_t count, float* logits, bool every);
    Status rewind(int64_t position);
    int64_t position() const { return position_; }
    int64_t bytes_per_token() const;

    Model();
    ~Model();

  private:
    friend class Prefill;
    Status check(const ModelPlan& plan);
    bool allocate();
    void run(int thread);
    void layer(int thread, int64_t index);
    void attention(int thread, int64_t index);
    void head(int thread);
    void append(int thread, int64_t index);
    void multiply(int thread, std::initializer_list<Linear> layers, const float* x);
    void turn(const LayerPlan& layer, const float* norm, const float* x, float* out) const;
    float* keys(int64_t layer, int64_t head) { return cache_[size_t(layer)].as<float>() + head * cache_stride(layer); }
    float* values(int64_t layer, int64_t head) { return keys(layer, plan_.layers[layer].kv_heads + head); }
    int64_t cache_stride(int64_t layer) const { return plan_.context * plan_.layers[layer].head_dim; }

    ModelPlan plan_{};
    std::vector<LayerPlan> layers_;
    const Kernels* kernels_ = nullptr;
    Pool* pool_ = nullptr;
    std::unique_ptr<Prefill> prefill_;  // made when it is first needed
    std::vector<Scratch> scratch_;
    std::vector<Buffer> cache_;  // [2, kv_heads, context, head_dim] of each layer
    Buffer qkv_, mixed_, projected_, gate_, up_, down_;  // written by rows, read by all after a barrier
    int64_t widest_ = 0;
    int64_t position_ = 0;
    int64_t token_ = 0;
    float* logits_ = nullptr;
};

}  // namespace prunus
