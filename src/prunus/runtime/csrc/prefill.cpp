// Many tokens through all layers: the same steps as in decode.cpp, on tiles of 64 tokens that lie in the lanes of vectors.
#include "prefill.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace prunus {

bool Prefill::allocate() {
    const int64_t bytes = BATCH * TILE * model_.widest_ * 4;
    int64_t rotary = 0;
    for (const LayerPlan& layer : model_.layers_) rotary = std::max(rotary, layer.rotary);
    for (Buffer* buffer : {&hidden_, &normed_, &gathered_, &qkv_, &mixed_, &gate_, &up_})
        if (!buffer->allocate(bytes)) return false;
    threads_ = std::vector<Own>(size_t(model_.pool_->size()));
    for (Own& own : threads_) {
        if (!own.lists.allocate(model_.widest_)) return false;
        if (!own.cos.allocate(rotary * TILE * 4) || !own.sin.allocate(rotary * TILE * 4)) return false;
    }
    return true;
}

Status Prefill::run(const int64_t* tokens, int64_t count, float* logits, bool every) {
    tokens_ = tokens;
    count_ = count;
    tiles_ = ceil_div(count, TILE);
    logits_ = logits;
    model_.logits_ = logits;
    every_ = every;
    if (every && logits && !scores_.size() && !scores_.allocate(TILE * model_.plan_.vocabulary * 4)) return NO_MEMORY;
    // Measured before the threads start, by one of them.
    for (const LayerPlan& layer : model_.layers_)
        for (const Matrix* matrix : {layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down})
            if (matrix->layout > DENSE_I8) crossover(*model_.kernels_);
    model_.pool_->run([](void* self, int thread) { static_cast<Prefill*>(self)->work(thread); }, this);
    model_.position_ += count;
    return OK;
}

void Prefill::barrier() { model_.pool_->barrier(); }

void Prefill::part(int64_t size, int thread, int64_t& first, int64_t& last) const {
    first = size * thread / model_.pool_->size();
    last = size * (thread + 1) / model_.pool_->size();
}

void Prefill::work(int thread) {
    embed(thread);
    barrier();
    for (const LayerPlan& layer : model_.layers_) {
        normalise(thread, hidden_, layer.attention_norm, layer.norm_eps, normed_);
        barrier();
        const int64_t wide = layer.q->rows, narrow = layer.k->rows;
        apply(thread, *layer.q, nullptr, layer.q_bias, normed_, qkv_.as<float>());
        apply(thread, *layer.k, layer.q, layer.k_bias, normed_, qkv_.as<float>() + tiles_ * wide * TILE);
        apply(thread, *layer.v, layer.k, layer.v_bias, normed_, qkv_.as<float>() + tiles_ * (wide + narrow) * TILE);
        barrier();
        append(thread, layer);
        barrier();
        attention(thread, layer);
        barrier();
        apply(thread, *layer.o, nullptr, layer.o_bias, mixed_, qkv_.as<float>());
        barrier();
        add(thread, qkv_, layer.post_attention_norm, layer.norm_eps);
        barrier();
        normalise(thread, hidden_, layer.mlp_norm, layer.norm_eps, normed_);
        barrier();
        apply(thread, *layer.gate, nullptr, layer.gate_bias, normed_, gate_.as<float>());
        apply(thread, *layer.up, layer.gate, layer.up_bias, normed_, up_.as<float>());
        barrier();
        int64_t first, last;
        part(tiles_ * layer.up->rows, thread, first, last);
        model_.kernels_->gate(Activation(layer.activation), gate_.as<float>() + first * TILE, (last - first) * TILE,
                              up_.as<float>() + first * TILE);
        barrier();
        apply(thread, *layer.down, nullptr, layer.down_bias, up_, qkv_.as<float>());
        barrier();
        add(thread, qkv_, layer.post_mlp_norm, layer.norm_eps);
        barrier();
    }
    if (!logits_) return;
    if (every_)
        all_logits(thread);
    else
        last_logits(thread);
}

void Prefill::embed(int thread) {
    int64_t first, last;
    part(tiles_ * TILE, thread, first, last);
    const int64_t size = model_.plan_.hidden;
    float* row = model_.scratch_[size_t(thread)].hidden.as<float>();
    for (int64_t token = first; token < last; token++) {
        float* out = hidden_.as<float>() + token / TILE * size * TILE + token % TILE;
        if (token < count_)
            decode_rows(*model_.plan_.embedding, tokens_[token], 1, row);
        else
            std::memset(row, 0, size_t(size) * 4);
        for (int64_t i = 0; i < size; i++) out[i * TILE] = row[i] * model_.plan_.embedding_scale;
    }
}

// Norm of [tiles, hidden, 64] in the rows of this thread; the sums of squares are every thread's own.
void Prefill::normalise(int thread, const Buffer& x, const float* weight, float eps, Buffer& out) {
    const int64_t size = model_.plan_.hidden;
    int64_t first, last;
    part(size, thread, first, last);
    float inverse[TILE];
    for (int64_t tile = 0; tile < tiles_; tile++) {
        const float* from = x.as<float>() + tile * size * TILE;
        model_.kernels_->tile.inverse_norms(from, size, eps, inverse);
        model_.kernels_->tile.scale_rows(from + first * TILE, inverse, weight + first, last - first,
                                         out.as<float>() + (tile * size + first) * TILE);
    }
}

// hidden += change, or its norm.
void Prefill::add(int thread, const Buffer& change, const float* norm, float eps) {
    const int64_t size = model_.plan_.hidden;
    const Buffer* from = &change;
    if (norm) {
        normalise(thread, change, norm, eps, normed_);
        from = &normed_;
    }
    int64_t first, last;
    part(size, thread, first, last);
    for (int64_t tile = 0; tile < tiles_; tile++) {
        const int64_t at = (tile * size + first) * TILE;
        model_.kernels_->add(from->as<float>() + at, (last - first) * TILE, hidden_.as<float>() + at);
    }
}

// y [tiles, rows, 64]; `before`: the matrix for which `x` was gathered last, if it is still there.
void Prefill::apply(int thread, const Matrix& matrix, const Matrix* before, const float* bias, const Buffer& x,
                    float* y) {
    if (!before || before->order != matrix.order || before->quantised_input != matrix.quantised_input) {
        if (before) barrier();
        int64_t first, last;
        part(matrix.chunks, thread, first, last);
        for (int64_t tile = 0; tile < tiles_; tile++)
            model_.kernels_->tile.gather(matrix, x.as<float>() + tile * matrix.columns * TILE, first, last,
                                         gathered_.as<float>() + tile * matrix.padded() * TILE);
        barrier();
    }
    int64_t first, last;
    share(matrix.rows, thread, model_.pool_->size(), first, last);
    if (first >= last) return;
    model_.kernels_->tile.multiply(matrix, as_dense(*model_.kernels_, matrix), gathered_.as<float>(), tiles_, y, first,
                                   last, threads_[size_t(thread)].lists.lists());
    for (int64_t tile = 0; bias && tile < tiles_; tile++)
        for (int64_t row = first; row < last; row++)
            for (int64_t i = 0; i < TILE; i++) y[(tile * matrix.rows + row) * TILE + i] += bias[row];
}

// Cosines and sines of the tile's positions as [rotary][64]; positions behind the last token repeat it.
void Prefill::tables(Own& own, const LayerPlan& layer, int64_t tile) {
    for (int64_t i = 0; i < TILE; i++) {
        const int64_t token = std::min(tile * TILE + i, count_ - 1), at = (model_.position_ + token) * layer.rotary;
        for (int64_t d = 0; d < layer.rotary; d++) {
            own.cos.as<float>()[d * TILE + i] = layer.cos[at + d];
            own.sin.as<float>()[d * TILE + i] = layer.sin[at + d];
        }
    }
}

// Keys and values of the new tokens into the cache, token by token.
void Prefill::append(int thread, const LayerPlan& layer) {
    Own& own = threads_[size_t(thread)];
    const int64_t dim = layer.head_dim, index = &layer - model_.layers_.data();
    int64_t first, last;
    part(tiles_ * layer.kv_heads, thread, first, last);
    for (int64_t item = first; item < last; item++) {
        const int64_t tile = item / layer.kv_heads, head = item % layer.kv_heads;
        const int64_t count = std::min(TILE, count_ - tile * TILE), at = (model_.position_ + tile * TILE) * dim;
        const int64_t narrow = layer.kv_heads * dim, row = (tile * narrow + head * dim) * TILE;
        float* key = qkv_.as<float>() + tiles_ * layer.q->rows * TILE + row;
        if (item == first || head == 0) tables(own, layer, tile);
        model_.kernels_->tile.turn(key, layer.k_norm, layer.qk_eps, dim, own.cos.as<float>(), own.sin.as<float>(),
                                   layer.rotary);
        model_.kernels_->tile.transpose(key, TILE, dim, count, model_.keys(index, head) + at, dim);
        model_.kernels_->tile.transpose(key + tiles_ * narrow * TILE, TILE, dim, count, model_.values(index, head) + at,
                                        dim);
    }
}

void Prefill::attention(int thread, const LayerPlan& layer) {
    Own& own = threads_[size_t(thread)];
    const int64_t dim = layer.head_dim, index = &layer - model_.layers_.data(), group = layer.heads / layer.kv_heads;
    // Turn by turn: later tiles see more keys, so neighbours go to different threads.
    int64_t before = -1;
    for (int64_t item = thread; item < tiles_ * layer.heads; item += model_.pool_->size()) {
        const int64_t tile = item / layer.heads, head = item % layer.heads, row = (tile * layer.heads + head) * dim;
        if (tile != before) tables(own, layer, tile);
        before = tile;
        float* query = qkv_.as<float>() + row * TILE;
        model_.kernels_->tile.turn(query, layer.q_norm, layer.qk_eps, dim, own.cos.as<float>(), own.sin.as<float>(),
                                   layer.rotary);
        model_.kernels_->tile.attend({query, model_.keys(index, head / group), model_.values(index, head / group), dim,
                                      model_.position_ + tile * TILE, std::min(TILE, count_ - tile * TILE),
                                      layer.window, layer.scale, layer.softcap, mixed_.as<float>() + row * TILE});
    }
}

void Prefill::last_logits(int thread) {
    const int64_t size = model_.plan_.hidden, token = count_ - 1;
    const float* from = hidden_.as<float>() + token / TILE * size * TILE + token % TILE;
    float* out = model_.scratch_[size_t(thread)].hidden.as<float>();
    for (int64_t i = 0; i < size; i++) out[i] = from[i * TILE];
    model_.head(thread);
}

void Prefill::all_logits(int thread) {
    const ModelPlan& plan = model_.plan_;
    normalise(thread, hidden_, plan.norm, plan.norm_eps, normed_);
    barrier();
    const int64_t tiles = tiles_;
    const Matrix& head = *plan.head;
    int64_t first, last, chunk, end;
    share(head.rows, thread, model_.pool_->size(), first, last);
    part(head.chunks, thread, chunk, end);
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t count = std::min(TILE, count_ - tile * TILE);
        model_.kernels_->tile.gather(head, normed_.as<float>() + tile * plan.hidden * TILE, chunk, end,
                                     gathered_.as<float>());
        barrier();
        if (first < last) {
            model_.kernels_->tile.multiply(head, as_dense(*model_.kernels_, head), gathered_.as<float>(), 1,
                                           scores_.as<float>(), first, last, threads_[size_t(thread)].lists.lists());
            finish(tile, first, last, count);
        }
        barrier();
    }
}

// Bias, cap and order of the logits of some rows of the head.
void Prefill::finish(int64_t tile, int64_t first, int64_t last, int64_t count) {
    const ModelPlan& plan = model_.plan_;
    float* out = logits_ + tile * TILE * plan.vocabulary + first;
    model_.kernels_->tile.transpose(scores_.as<float>() + first * TILE, TILE, last - first, count, out,
                                    plan.vocabulary);
    for (int64_t token = 0; token < count; token++, out += plan.vocabulary)
        for (int64_t row = 0; row < last - first; row++) {
            if (plan.head_bias) out[row] += plan.head_bias[first + row];
            if (plan.logit_softcap > 0) out[row] = plan.logit_softcap * std::tanh(out[row] / plan.logit_softcap);
        }
}

}  // namespace prunus
