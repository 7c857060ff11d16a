// What follows from a summed payload, [Σx, Σx², N] (2C+1,): mean, variance and the running statistics.
#pragma once

#include <cmath>

#include "tensors.h"

struct Moments {
    const double *s1, *s2;
    double count, n;

    Moments(const double *total, int64_t C)
        : s1(total), s2(total + C), count(total[2 * C]), n(std::max(total[2 * C], 1.0)) {}
    double mean(int64_t c) const { return s1[c] / n; }
    double variance(int64_t c) const {  // biased
        const double v = s2[c] / n - mean(c) * mean(c);
        return v < 0 ? 0 : v;  // a NaN stays
    }
};

// A buffer that is moved: itself where it is dense float32 or float64, else a float64 copy that `finish` copies back.
class Buffer {
  public:
    Buffer(const char *name, nb::handle tensor, int64_t length) : tensor_(nb::borrow(tensor)) {
        if (tensor.is_none()) return;
        const Tensor given(tensor);
        check_length(name, given, length);
        memory_ = Memory(name, tensor, given);
        if (memory_->dtype == INT64) refuse_dtype(name, tensor);
        if (memory_->dtype > FLOAT64 || !given.is_contiguous()) {
            copy_ = call(call(call(tensor, torch().to_double), torch().clone), torch().contiguous);
            memory_ = Memory(name, copy_, Tensor(copy_));
        }
    }

    // buffer += momentum·(of(c) - buffer)
    template <class Of>
    void move(int64_t C, double momentum, Of of) {
        if (!memory_) return;
        if (memory_->dtype == FLOAT64)
            move((double *)memory_->at, C, momentum, of);
        else
            move((float *)memory_->at, C, momentum, of);
    }

    void finish() {
        if (copy_) checked(call_method(tensor_, torch().copy, copy_.ptr()));
    }

  private:
    template <class T, class Of>
    static void move(T *buffer, int64_t C, double momentum, Of of) {
        for (int64_t c = 0; c < C; c++) {
            const double old = buffer[c];
            buffer[c] = T(old + momentum * (of(c) - old));
        }
    }

    nb::object tensor_, copy_;
    std::optional<Memory> memory_;
};

// The four fields of Running in syncbn/_statistics.py, or None.
class Running {
  public:
    Running(nb::handle fields, int64_t C)
        : mean_("running_mean", field(fields, 0), C), var_("running_var", field(fields, 1), C) {
        const nb::handle batches = field(fields, 2), momentum = field(fields, 3);
        if (!batches.is_none()) {
            const Tensor given(batches);
            check_length("num_batches_tracked", given, 1);
            const Memory of("num_batches_tracked", batches, given);
            if (of.dtype != INT64) refuse_dtype("num_batches_tracked", batches);
            batches_ = (int64_t *)of.at;
        }
        if (momentum.is_none())
            momentum_ = batches_ ? 1 / double(*batches_ + 1) : 0;
        else
            momentum_ = PyFloat_AsDouble(momentum.ptr());
        if (PyErr_Occurred()) throw nb::python_error();
    }

    // With the mean and the unbiased variance; only the count where N is 0.
    void move(const Moments &of, int64_t C) {
        if (batches_) ++*batches_;
        if (of.count == 0) return;
        const double unbiased = of.count / std::max(of.count - 1, 1.0);
        mean_.move(C, momentum_, [&](int64_t c) { return of.mean(c); });
        var_.move(C, momentum_, [&](int64_t c) { return unbiased * of.variance(c); });
    }

    void finish() { mean_.finish(), var_.finish(); }

  private:
    static nb::handle field(nb::handle fields, Py_ssize_t k) {
        return fields.is_none() ? fields : ::field("running", fields, 4, k);
    }

    Buffer mean_, var_;
    int64_t *batches_ = nullptr;
    double momentum_;
};
