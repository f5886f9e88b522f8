// Runs every layout of every instruction set on many shapes, and the loader on damaged matrices. Built with sanitizers by
// .ci/sanitize: they find what a test of results cannot, reads and writes beside a buffer.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../../src/prunus/runtime/csrc/activations.h"
#include "../../src/prunus/runtime/csrc/prefill.h"

using namespace prunus;

namespace {

std::mt19937 noise(1);

void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

double uniform() { return double(noise() >> 8) / double(1 << 24); }

struct Sample {
    int64_t rows, columns;
    int32_t kind;
    std::vector<uint8_t> bitmap, values;
    std::vector<uint16_t> scales;
    std::vector<int32_t> order;

    // Copied to the byte: what is read behind the end is found.
    Packed packed() const {
        return {rows, columns, kind, bitmap.data(), int64_t(bitmap.size()), values.data(), int64_t(values.size()),
                scales.data(), int64_t(scales.size()), order.empty() ? nullptr : order.data(), int64_t(order.size())};
    }
};

Sample sample(int64_t rows, int64_t columns, int32_t kind, double density, bool permuted) {
    Sample made{rows, columns, kind, {}, {}, {}, {}};
    const int64_t stride = ceil_div(columns, 8);
    made.bitmap.assign(size_t(rows * stride), 0);
    for (int64_t row = 0; row < rows; row++) {
        int64_t count = 0;
        for (int64_t column = 0; column < columns; column++) {
            if (uniform() >= density) continue;
            made.bitmap[size_t(row * stride + column / 8)] |= uint8_t(1 << (column % 8));
            count++;
        }
        const float one = 0.5f;
        for (int64_t i = 0; i < count; i++) {
            uint8_t bytes[4];
            std::memcpy(bytes, &one, 4);
            if (kind == 0) made.values.insert(made.values.end(), bytes, bytes + 4);
            if (kind == 1) made.values.insert(made.values.end(), bytes + 2, bytes + 4);
            if (kind == 2) made.values.push_back(uint8_t(noise()));
            if (kind == 3 && i % 2 == 0) made.values.push_back(uint8_t(i + 1 < count ? noise() : noise() & 15));
        }
    }
    if (kind >= 2) made.scales.assign(size_t(rows * ceil_div(columns, GROUP)), 0x3000);  // 0.125
    for (int64_t i = 0; permuted && i < columns; i++) made.order.push_back(int32_t(columns - 1 - i));
    return made;
}

// The product with decoded rows, for one token and for many.
void compare(const Kernels& kernels, Pool& pool, const Matrix& matrix) {
    const int64_t tokens = TILE + 3;
    std::vector<float> x(size_t(tokens * matrix.columns)), few(size_t(matrix.rows * 2)), many(size_t(tokens * matrix.rows));
    for (float& value : x) value = float(int(noise() % 255) - 127) / 127.0f;
    for (int64_t token = 0; token < tokens; token++) x[size_t(token * matrix.columns)] = 1.0f;
    require(multiply(kernels, pool, matrix, x.data(), 2, few.data()) == OK, "multiply");
    require(multiply_tiles(kernels, pool, matrix, x.data(), tokens, many.data()) == OK, "multiply_tiles");
    std::vector<float> row(size_t(matrix.padded()));
    for (int64_t r = 0; r < matrix.rows; r++) {
        decode_rows(matrix, r, 1, row.data());
        for (int64_t token = 0; token < 2; token++) {
            double sum = 0, size = 1e-6;
            for (int64_t i = 0; i < matrix.columns; i++) {
                const int64_t from = matrix.order.empty() ? i : matrix.order[size_t(i)];
                sum += double(row[size_t(i)]) * x[size_t(token * matrix.columns + from)];
                size += std::fabs(double(row[size_t(i)]));
            }
            const double tolerance = (matrix.quantised_input ? 0.01 : 1e-5) * size;
            require(std::fabs(sum - few[size_t(token * matrix.rows + r)]) < tolerance, "a token");
            require(std::fabs(sum - many[size_t(token * matrix.rows + r)]) < tolerance, "a tile");
        }
    }
}

void layouts(const Kernels& kernels, Pool& pool) {
    const int64_t shapes[][2] = {{1, 1}, {3, 17}, {16, 64}, {33, 65}, {17, 130}, {40, 300}};
    for (const auto& shape : shapes)
        for (const double density : {0.0, 0.3, 1.0})
            for (int32_t kind = 0; kind < 4; kind++)
                for (int32_t layout = 0; layout < (kind < 2 ? 1 : 4); layout++) {
                    std::unique_ptr<Matrix> matrix;
                    const Sample made = sample(shape[0], shape[1], kind, density, shape[0] % 2);
                    require(build(made.packed(), layout, matrix) == OK, "build");
                    compare(kernels, pool, *matrix);
                }
    for (const auto& shape : shapes)
        for (int32_t kind = 0; kind < 3; kind++) {
            std::unique_ptr<Matrix> matrix;
            const int64_t width = kind == 0 ? 4 : kind == 1 ? 2 : 1;
            const std::vector<uint8_t> values(size_t(shape[0] * shape[1] * width), 0);
            const std::vector<uint16_t> scales(size_t(shape[0] * ceil_div(shape[1], GROUP)), 0x3000);
            const Packed packed{shape[0], shape[1], kind, nullptr, 0, values.data(), int64_t(values.size()),
                                scales.data(), int64_t(scales.size()), nullptr, 0};
            require(build_dense(packed, matrix) == OK, "build_dense");
            compare(kernels, pool, *matrix);
        }
}

// Whatever is changed in a matrix, it is refused or it can be multiplied; sizes are taken at their word.
void damage(const Kernels& kernels, Pool& pool, int turns) {
    int refused = 0;
    for (int turn = 0; turn < turns; turn++) {
        Sample made = sample(1 + noise() % 40, 1 + noise() % 150, int32_t(noise() % 4), uniform(), noise() % 2);
        for (int change = 0; change < 1 + int(noise() % 3); change++) {
            const uint32_t what = noise() % 8;
            if (what == 0) made.rows += int64_t(noise() % 3) - 1;
            if (what == 1) made.columns += int64_t(noise() % 3) - 1;
            if (what == 2) made.kind = int32_t(noise() % 6) - 1;
            if (what == 3 && !made.bitmap.empty()) made.bitmap[noise() % made.bitmap.size()] ^= uint8_t(1 << (noise() % 8));
            if (what == 4) made.values.resize(made.values.size() + noise() % 3);
            if (what == 5 && !made.values.empty()) made.values.pop_back();
            if (what == 6 && !made.scales.empty()) made.scales[noise() % made.scales.size()] = uint16_t(noise());
            if (what == 7 && !made.order.empty()) made.order[noise() % made.order.size()] = int32_t(noise());
        }
        std::unique_ptr<Matrix> matrix;
        if (build(made.packed(), int32_t(noise() % 4), matrix) != OK) {
            refused++;
            continue;
        }
        std::vector<float> x(size_t(matrix->columns * 13), 1.0f), y(size_t(matrix->rows * 13));
        require(multiply(kernels, pool, *matrix, x.data(), 1, y.data()) == OK, "multiply");
        require(multiply_tiles(kernels, pool, *matrix, x.data(), 13, y.data()) == OK, "multiply_tiles");
    }
    // Of a few turns all may be refused: six of seven are.
    require(turns < 100 || (refused > turns / 4 && refused < turns), "some are refused, some are not");
}

// A model of odd sizes: steps and tiles, to the end of the context and beyond.
void decode(const Kernels& kernels, Pool& pool) {
    const int64_t hidden = 24, heads = 3, dim = 6, mlp = 37, vocabulary = 50, context = 150;
    auto matrix = [](int64_t rows, int64_t columns, int32_t kind, int32_t layout) {
        std::unique_ptr<Matrix> made;
        require(build(sample(rows, columns, kind, 0.5, kind == 2).packed(), layout, made) == OK, "build");
        return made;
    };
    const auto q = matrix(heads * dim, hidden, 2, 1), k = matrix(dim, hidden, 3, 2), v = matrix(dim, hidden, 0, 0);
    const auto o = matrix(hidden, heads * dim, 1, 0), gate = matrix(mlp, hidden, 2, 2), up = matrix(mlp, hidden, 3, 1);
    const auto down = matrix(hidden, mlp, 2, 2), table = matrix(vocabulary, hidden, 0, 0);
    const std::vector<float> ones(size_t(hidden), 1.0f), turns(size_t(context * 4), 0.7f);
    LayerPlan layer{};
    layer.q = q.get(), layer.k = k.get(), layer.v = v.get(), layer.o = o.get();
    layer.gate = gate.get(), layer.up = up.get(), layer.down = down.get();
    layer.attention_norm = layer.mlp_norm = layer.post_mlp_norm = layer.q_norm = layer.k_norm = ones.data();
    layer.o_bias = layer.q_bias = ones.data();
    layer.cos = layer.sin = turns.data();
    layer.heads = heads, layer.kv_heads = 1, layer.head_dim = dim, layer.rotary = 4, layer.window = 20;
    layer.norm_eps = layer.qk_eps = 1e-5f, layer.scale = 0.4f, layer.softcap = 5, layer.activation = GELU;
    const LayerPlan layers[] = {layer, layer};
    const ModelPlan plan{layers, 2, hidden, vocabulary, context, table.get(), table.get(),
                         ones.data(), nullptr, 1e-5f, 1, 9, 0};
    Model model;
    require(model.build(plan, kernels, pool) == OK, "model");
    std::vector<int64_t> tokens(size_t(context), 3);
    std::vector<float> logits(size_t(context * vocabulary));
    require(model.prefill(tokens.data(), 70, logits.data(), false) == OK, "prefill");
    require(model.prefill(tokens.data(), 79, logits.data(), true) == OK, "prefill");
    require(model.step(1, logits.data()) == OK, "step");
    require(model.step(1, logits.data()) == TOO_LONG, "the end of the context");
    require(model.rewind(149) == OK && model.step(vocabulary, nullptr) == BAD_TOKEN, "a wrong token");
    require(model.prefill(tokens.data(), 2, nullptr, false) == TOO_LONG, "a prompt behind the end");
    LayerPlan narrow = layer;
    narrow.heads = 2;
    ModelPlan wrong = plan;
    wrong.layers = &narrow;
    wrong.layer_count = 1;
    require(Model().build(wrong, kernels, pool) == BAD_SHAPE, "shapes that do not fit");
}

}  // namespace

int main(int count, char** arguments) {
    const bool short_run = count > 1 && std::strcmp(arguments[1], "short") == 0;
    for (const char* isa : {"portable", "avx2", "avx512", "neon"}) {
        const Kernels* kernels = choose(isa);
        if (!kernels) continue;
        Pool pool(short_run ? 3 : 2);
        if (!short_run) layouts(*kernels, pool);
        damage(*kernels, pool, short_run ? 20 : 1500);
        decode(*kernels, pool);
        std::printf("%s: all is well\n", isa);
    }
}
