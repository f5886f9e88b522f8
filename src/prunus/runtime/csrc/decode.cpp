// One token: six phases a layer, a barrier behind each. Every thread keeps its own copy of the hidden state
// and repeats what is cheap (norms, rounding, gates), which saves barriers; only rows of matrices and heads are divided.
#include "prefill.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

namespace prunus {
Model::Model() = default;
Model::~Model() = default;

Status Model::build(const ModelPlan& plan, const Kernels& kernels, Pool& pool) try {
    const Status status = check(plan);
    if (status != OK) return status;
    layers_.assign(plan.layers, plan.layers + plan.layer_count);
    plan_ = plan;
    plan_.layers = layers_.data();
    kernels_ = &kernels;
    pool_ = &pool;
    return allocate() ? OK : NO_MEMORY;
} catch (const std::bad_alloc&) {
    return NO_MEMORY;
}

Status Model::check(const ModelPlan& plan) {
    auto fits = [](const Matrix* matrix, int64_t rows, int64_t columns) {
        return matrix && matrix->rows == rows && matrix->columns == columns;
    };
    if (plan.layer_count < 1 || plan.hidden < 1 || plan.context < 1 || !plan.layers || !plan.norm) return BAD_ARGUMENT;
    if (!fits(plan.embedding, plan.vocabulary, plan.hidden)) return BAD_SHAPE;
    if (!fits(plan.head, plan.vocabulary, plan.hidden)) return BAD_SHAPE;
    if (plan.embedding->layout >= W16_I8 || !plan.embedding->order.empty()) return BAD_ARGUMENT;
    for (int64_t i = 0; i < plan.layer_count; i++) {
        const LayerPlan& layer = plan.layers[i];
        if (layer.heads < 1 || layer.kv_heads < 1 || layer.head_dim < 1 || layer.window < 0) return BAD_ARGUMENT;
        if (layer.heads % layer.kv_heads || layer.rotary < 0 || layer.rotary > layer.head_dim || layer.rotary % 2)
            return BAD_SHAPE;
        if (layer.rotary && (!layer.cos || !layer.sin)) return BAD_ARGUMENT;
        if (!layer.attention_norm || !layer.mlp_norm || layer.activation < SILU || layer.activation > RELU_SQUARED)
            return BAD_ARGUMENT;
        const int64_t wide = layer.heads * layer.head_dim, narrow = layer.kv_heads * layer.head_dim;
        if (!fits(layer.q, wide, plan.hidden) || !fits(layer.k, narrow, plan.hidden)) return BAD_SHAPE;
        if (!fits(layer.v, narrow, plan.hidden) || !fits(layer.o, plan.hidden, wide) || !layer.gate) return BAD_SHAPE;
        if (!fits(layer.gate, layer.gate->rows, plan.hidden) || !fits(layer.up, layer.gate->rows, plan.hidden))
            return BAD_SHAPE;
        if (!fits(layer.down, plan.hidden, layer.gate->rows)) return BAD_SHAPE;
    }
    return OK;
}

bool Model::allocate() {
    int64_t attention = 0, hidden_mlp = 0, dim = 0;
    for (const LayerPlan& layer : layers_) {
        attention = std::max(attention, (layer.heads + 2 * layer.kv_heads) * layer.head_dim);
        hidden_mlp = std::max(hidden_mlp, layer.gate->rows);
        dim = std::max(dim, layer.head_dim);
    }
    widest_ = ceil_div(std::max(std::max(attention, hidden_mlp), plan_.hidden), CHUNK) * CHUNK;
    const int64_t floats = widest_ * 4;
    cache_.resize(layers_.size());
    for (size_t i = 0; i < layers_.size(); i++)
        if (!cache_[i].reserve(2 * layers_[i].kv_heads * cache_stride(int64_t(i)) * 4)) return false;
    scratch_.resize(size_t(pool_->size()));
    for (Scratch& scratch : scratch_) {
        bool ok = scratch.hidden.allocate(floats) && scratch.normed.allocate(floats);
        ok = ok && scratch.scores.reserve(plan_.context * 4) && scratch.query.allocate(dim * 4);
        if (!ok || !scratch.activations.allocate(widest_)) return false;
    }
    return qkv_.allocate(floats) && mixed_.allocate(floats) && projected_.allocate(floats) && gate_.allocate(floats) &&
           up_.allocate(floats) && down_.allocate(floats);
}

int64_t Model::bytes_per_token() const {
    int64_t bytes = plan_.head->bytes() + plan_.hidden * 4;
    for (const LayerPlan& layer : layers_)
        for (const Matrix* matrix : {layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down})
            bytes += matrix->bytes();
    return bytes;
}

Status Model::rewind(int64_t position) {
    if (position < 0 || position > position_) return BAD_ARGUMENT;
    position_ = position;
    return OK;
}

Status Model::step(int64_t token, float* logits) {
    if (position_ >= plan_.context) return TOO_LONG;
    if (token < 0 || token >= plan_.vocabulary) return BAD_TOKEN;
    token_ = token;
    logits_ = logits;
    pool_->run([](void* model, int thread) { static_cast<Model*>(model)->run(thread); }, this);
    position_++;
    return OK;
}

Status Model::prefill(const int64_t* tokens, int64_t count, float* logits, bool every) try {
    if (count < 0 || count > plan_.context - position_) return TOO_LONG;
    for (int64_t i = 0; i < count; i++)
        if (tokens[i] < 0 || tokens[i] >= plan_.vocabulary) return BAD_TOKEN;
    auto out = [&](int64_t first, int64_t end) -> float* {
        if (!logits) return nullptr;
        return every ? logits + first * plan_.vocabulary : end == count ? logits : nullptr;
    };
    int64_t done = 0;
    while (count - done >= FEW) {
        if (!prefill_) {
            prefill_ = std::make_unique<Prefill>(*this);
            if (!prefill_->allocate()) {
                prefill_.reset();
                return NO_MEMORY;
            }
        }
        // What is left behind whole tiles is a tile of its own unless it is little.
        int64_t end = std::min(count, done + Prefill::BATCH * TILE);
        if (end == count && (end - done) % TILE < FEW && end - done > TILE) end -= (end - done) % TILE;
        const Status status = prefill_->run(tokens + done, end - done, out(done, end), every);
        if (status != OK) return status;
        done = end;
    }
    for (; done < count; done++) {
        const Status status = step(tokens[done], out(done, done + 1));
        if (status != OK) return status;
    }
    return OK;
} catch (const std::bad_alloc&) {
    return NO_MEMORY;
}

// Products of the same vector, block of rows by block to whoever is free. `x` is prepared again where an order changes.
void Model::multiply(int thread, std::initializer_list<Linear> layers, const float* x) {
    Activations& activations = scratch_[size_t(thread)].activations;
    activations.forget();
    int64_t blocks = 0, begin, end;
    for (const Linear& layer : layers) blocks += layer.matrix.blocks();
    while (pool_->take(blocks, begin, end)) {
        for (const Linear& layer : layers) {
            const Matrix& matrix = layer.matrix;
            const int64_t first = std::max<int64_t>(begin, 0) * BLOCK, last = std::min(end * BLOCK, matrix.rows);
            begin -= matrix.blocks();
            end -= matrix.blocks();
            if (first >= last) continue;
            activations.set(*kernels_, matrix, x);
            kernels_->matvec(matrix, activations.input(), layer.y, first, last);
            if (layer.bias) kernels_->add(layer.bias + first, last - first, layer.y + first);
        }
    }
}

void Model::run(int thread) {
    Scratch& scratch = scratch_[size_t(thread)];
    float* hidden = scratch.hidden.as<float>();
    decode_rows(*plan_.embedding, token_, 1, hidden);
    for (int64_t i = 0; i < plan_.hidden; i++) hidden[i] *= plan_.embedding_scale;
    for (int64_t index = 0; index < plan_.layer_count; index++) layer(thread, index);
    if (logits_) head(thread);
}

void Model::layer(int thread, int64_t index) {
    const LayerPlan& layer = layers_[size_t(index)];
    Scratch& scratch = scratch_[size_t(thread)];
    float *hidden = scratch.hidden.as<float>(), *normed = scratch.normed.as<float>(), *qkv = qkv_.as<float>();
    const int64_t wide = layer.q->rows, narrow = layer.k->rows;

    kernels_->rms_norm(hidden, layer.attention_norm, layer.norm_eps, plan_.hidden, normed);
    multiply(thread,
             {{*layer.q, layer.q_bias, qkv},
              {*layer.k, layer.k_bias, qkv + wide},
              {*layer.v, layer.v_bias, qkv + wide + narrow}},
             normed);
    pool_->barrier();

    append(thread, index);
    pool_->barrier();
    attention(thread, index);
    pool_->barrier();

    multiply(thread, {{*layer.o, layer.o_bias, projected_.as<float>()}}, mixed_.as<float>());
    pool_->barrier();

    const float* change = projected_.as<float>();
    if (layer.post_attention_norm) {
        kernels_->rms_norm(change, layer.post_attention_norm, layer.norm_eps, plan_.hidden, normed);
        change = normed;
    }
    kernels_->add(change, plan_.hidden, hidden);
    kernels_->rms_norm(hidden, layer.mlp_norm, layer.norm_eps, plan_.hidden, normed);
    multiply(thread, {{*layer.gate, layer.gate_bias, gate_.as<float>()}, {*layer.up, layer.up_bias, up_.as<float>()}},
             normed);
    pool_->barrier();

    // Every thread for itself: another may have made the rows.
    std::memcpy(normed, up_.as<float>(), size_t(layer.up->rows) * 4);
    kernels_->gate(Activation(layer.activation), gate_.as<float>(), layer.up->rows, normed);
    multiply(thread, {{*layer.down, layer.down_bias, down_.as<float>()}}, normed);
    pool_->barrier();

    change = down_.as<float>();
    if (layer.post_mlp_norm) {
        kernels_->rms_norm(change, layer.post_mlp_norm, layer.norm_eps, plan_.hidden, normed);
        change = normed;
    }
    kernels_->add(change, plan_.hidden, hidden);
}

// Norm of one head, then its rotation at the present position.
void Model::turn(const LayerPlan& layer, const float* norm, const float* x, float* out) const {
    if (norm)
        kernels_->rms_norm(x, norm, layer.qk_eps, layer.head_dim, out);
    else
        std::memcpy(out, x, size_t(layer.head_dim) * 4);
    const float *cos = layer.cos + position_ * layer.rotary, *sin = layer.sin + position_ * layer.rotary;
    for (int64_t i = 0, half = layer.rotary / 2; i < half; i++) {
        const float a = out[i], b = out[i + half];
        out[i] = a * cos[i] - b * sin[i];
        out[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

void Model::append(int thread, int64_t index) {
    const LayerPlan& layer = layers_[size_t(index)];
    const int64_t dim = layer.head_dim, end = layer.kv_heads * (thread + 1) / pool_->size();
    for (int64_t head = layer.kv_heads * thread / pool_->size(); head < end; head++) {
        const float *key = qkv_.as<float>() + (layer.heads + head) * dim, *value = key + layer.kv_heads * dim;
        turn(layer, layer.k_norm, key, keys(index, head) + position_ * dim);
        std::memcpy(values(index, head) + position_ * dim, value, size_t(dim) * 4);
    }
}

void Model::attention(int thread, int64_t index) {
    const LayerPlan& layer = layers_[size_t(index)];
    Scratch& scratch = scratch_[size_t(thread)];
    const int64_t dim = layer.head_dim, group = layer.heads / layer.kv_heads, to = position_ + 1;
    const int64_t from = layer.window && to > layer.window ? to - layer.window : 0;
    int64_t head, end;
    while (pool_->take(layer.heads, head, end))
        for (; head < end; head++) {
            float* query = scratch.query.as<float>();
            turn(layer, layer.q_norm, qkv_.as<float>() + head * dim, query);
            kernels_->attend({query, keys(index, head / group), values(index, head / group), dim, from, to, layer.scale,
                              layer.softcap, scratch.scores.as<float>(), mixed_.as<float>() + head * dim});
        }
}

void Model::head(int thread) {
    Scratch& scratch = scratch_[size_t(thread)];
    kernels_->rms_norm(scratch.hidden.as<float>(), plan_.norm, plan_.norm_eps, plan_.hidden, scratch.normed.as<float>());
    multiply(thread, {{*plan_.head, plan_.head_bias, logits_}}, scratch.normed.as<float>());
    if (plan_.logit_softcap <= 0) return;
    pool_->barrier();
    int64_t first, last;
    share(plan_.vocabulary, thread, pool_->size(), first, last);
    for (int64_t i = first; i < last; i++)
        logits_[i] = plan_.logit_softcap * std::tanh(logits_[i] / plan_.logit_softcap);
}

}  // namespace prunus
