// The C interface that Python calls through ctypes. Handles are pointers; sizes are checked in matrix.cpp and decode.cpp.
#include <memory>
#include <new>

#include "decode.h"
#include "tiles.h"

using namespace prunus;

#if defined(_WIN32)
#define PRUNUS_API extern "C" __declspec(dllexport)
#else
#define PRUNUS_API extern "C" __attribute__((visibility("default")))
#endif

struct Runtime {
    const Kernels* kernels;
    Pool pool;
    Runtime(const Kernels* k, int threads) : kernels(k), pool(threads) {}
};

PRUNUS_API int32_t prunus_abi() { return 1; }

// nullptr: this processor cannot run `isa`, or there are no threads to be had.
PRUNUS_API Runtime* prunus_open(const char* isa, int32_t threads) try {
    const Kernels* kernels = choose(isa);
    return kernels && threads > 0 ? new Runtime(kernels, threads) : nullptr;
} catch (...) {
    return nullptr;
}

PRUNUS_API void prunus_close(Runtime* runtime) { delete runtime; }
PRUNUS_API const char* prunus_isa(const Runtime* runtime) { return runtime->kernels->name; }
PRUNUS_API int32_t prunus_threads(const Runtime* runtime) { return runtime->pool.size(); }
PRUNUS_API int32_t prunus_expands(const Runtime* runtime) { return runtime->kernels->expand; }

PRUNUS_API int32_t prunus_matrix(const Packed* packed, int32_t layout, Matrix** out) {
    std::unique_ptr<Matrix> matrix;
    const Status status = build(*packed, layout, matrix);
    *out = matrix.release();
    return status;
}

PRUNUS_API int32_t prunus_dense(const Packed* packed, Matrix** out) {
    std::unique_ptr<Matrix> matrix;
    const Status status = build_dense(*packed, matrix);
    *out = matrix.release();
    return status;
}

PRUNUS_API void prunus_matrix_free(Matrix* matrix) { delete matrix; }
PRUNUS_API int64_t prunus_matrix_bytes(const Matrix* matrix) { return matrix->bytes(); }
PRUNUS_API int32_t prunus_matrix_slots(const Matrix* matrix) { return matrix->slots; }

// y [tokens, rows] = x [tokens, columns] times the transposed matrix.
PRUNUS_API int32_t prunus_multiply(Runtime* runtime, const Matrix* matrix, const float* x, int64_t tokens, float* y) try {
    if (!runtime || !matrix || tokens < 0 || (tokens && (!x || !y))) return BAD_ARGUMENT;
    const auto with = tokens < FEW ? multiply : multiply_tiles;
    return with(*runtime->kernels, runtime->pool, *matrix, x, tokens, y);
} catch (const std::bad_alloc&) {
    return NO_MEMORY;
}

// Weights as floats in the order in which they are stored.
PRUNUS_API int32_t prunus_decode(const Matrix* matrix, int64_t row, float* out) {
    if (row < 0 || row >= matrix->rows) return BAD_ARGUMENT;
    decode_rows(*matrix, row, 1, out);
    return OK;
}

PRUNUS_API int32_t prunus_model(Runtime* runtime, const ModelPlan* plan, Model** out) try {
    auto model = std::make_unique<Model>();
    const Status status = model->build(*plan, *runtime->kernels, runtime->pool);
    if (status == OK) *out = model.release();
    return status;
} catch (const std::bad_alloc&) {
    return NO_MEMORY;
}

PRUNUS_API void prunus_model_free(Model* model) { delete model; }
PRUNUS_API int32_t prunus_step(Model* model, int64_t token, float* logits) { return model->step(token, logits); }
PRUNUS_API int32_t prunus_prefill(Model* model, const int64_t* tokens, int64_t count, float* logits, int32_t every) {
    return model->prefill(tokens, count, logits, every != 0);
}
PRUNUS_API double prunus_crossover(const Runtime* runtime) { return crossover(*runtime->kernels); }
PRUNUS_API int32_t prunus_rewind(Model* model, int64_t position) { return model->rewind(position); }
PRUNUS_API int64_t prunus_position(const Model* model) { return model->position(); }
PRUNUS_API int64_t prunus_bytes_per_token(const Model* model) { return model->bytes_per_token(); }
