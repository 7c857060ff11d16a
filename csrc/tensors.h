// Tensors as Python hands them over. Each is asked here for its device, dtype, sizes and address, so no caller can claim
// others; std::invalid_argument and TypeError name the argument.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "loops.h"

namespace nb = nanobind;

constexpr int INT64 = DTYPES, KNOWN = DTYPES + 1;

// What a tensor is asked for, in names that Python has interned: half the time of an attribute by its spelling.
struct Torch {
    PyObject *data_ptr = name("data_ptr"), *numel = name("numel"), *shape = name("shape"), *stride = name("stride"),
             *dtype = name("dtype"), *is_cpu = name("is_cpu"), *is_contiguous = name("is_contiguous"),
             *contiguous = name("contiguous"), *to_double = name("double"), *copy = name("copy_"), *clone = name("clone");
    PyObject *dtypes[KNOWN];

    Torch() {
        const nb::module_ torch = nb::module_::import_("torch");
        int k = 0;
        for (const char *of : {"float32", "float64", "bfloat16", "float16", "int64"})
            dtypes[k++] = nb::object(torch.attr(of)).release().ptr();
    }
    static PyObject *name(const char *text) { return PyUnicode_InternFromString(text); }
};

inline const Torch &torch() {
    static const Torch &names = *new Torch;  // as long as the process lives
    return names;
}

inline nb::object checked(PyObject *result) {
    if (!result) throw nb::python_error();
    return nb::steal(result);
}

inline nb::object get(nb::handle of, PyObject *name) { return checked(PyObject_GetAttr(of.ptr(), name)); }
inline nb::object call(nb::handle of, PyObject *name) { return checked(PyObject_CallMethodNoArgs(of.ptr(), name)); }
inline bool is_true(const nb::object &value) { return value.ptr() == Py_True; }

inline int64_t integer(nb::handle value) {
    const long long result = PyLong_AsLongLong(value.ptr());
    if (result == -1 && PyErr_Occurred()) throw nb::python_error();
    return result;
}

[[noreturn]] inline void refuse(const char *name, const std::string &why) {
    throw std::invalid_argument(std::string(name) + ": " + why);
}

[[noreturn]] inline void refuse_dtype(const char *name, nb::handle tensor) {
    const std::string text = std::string(name) + ": unexpected " + nb::str(get(tensor, torch().dtype)).c_str();
    throw nb::type_error(text.c_str());
}

// Where the values of a tensor begin, and their dtype: a DType, or INT64.
struct Memory {
    void *at;
    int dtype;

    Memory(const char *name, nb::handle tensor, int64_t length) : dtype(0) {
        if (!is_true(get(tensor, torch().is_cpu))) refuse(name, "expected a tensor on the CPU");
        const nb::object of = get(tensor, torch().dtype);
        while (dtype < KNOWN && of.ptr() != torch().dtypes[dtype]) dtype++;
        if (dtype == KNOWN) refuse_dtype(name, tensor);
        at = PyLong_AsVoidPtr(call(tensor, torch().data_ptr).ptr());
        if (PyErr_Occurred()) throw nb::python_error();
        if (!at && length) refuse(name, "has no memory of its own: a wrapper, or its storage was freed");
    }
};

// How a dense (N, C, *) lies in memory: planes (N, C, S) or, channels innermost, rows (N·S, C, 1).
struct Layout {
    int64_t N, C, S;
    bool operator==(const Layout &other) const { return N == other.N && C == other.C && S == other.S; }
};

// None where the tensor is neither.
inline std::optional<Layout> layout(nb::handle tensor) {
    const nb::object shape = get(tensor, torch().shape), strides = call(tensor, torch().stride);
    const Py_ssize_t dims = PyTuple_GET_SIZE(shape.ptr());
    if (dims < 2) return {};
    int64_t step = 1, inner = 1;
    const auto size = [&](Py_ssize_t d) { return integer(PyTuple_GET_ITEM(shape.ptr(), d)); };
    const auto follows = [&](Py_ssize_t d) {  // the next in memory?
        const bool dense = size(d) == 1 || integer(PyTuple_GET_ITEM(strides.ptr(), d)) == step;
        step *= size(d);
        return dense;
    };
    bool planes = true, rows = true;
    for (Py_ssize_t d = dims - 1; d >= 2; d--) planes = follows(d) && planes, inner *= size(d);
    planes = follows(1) && planes;
    planes = follows(0) && planes;
    const int64_t N = size(0), C = size(1);
    if (step == 0) return Layout{0, C, 1};
    if (planes) return Layout{N, C, inner};
    step = 1;
    rows = follows(1);
    for (Py_ssize_t d = dims - 1; d >= 2; d--) rows = follows(d) && rows;
    rows = follows(0) && rows;
    if (rows) return Layout{N * inner, C, 1};
    return {};
}

// x, dy, or a result of their size: dense, of a dtype of the loops.
struct Values : Layout, Memory {
    Values(const char *name, nb::handle tensor) : Layout(dense(name, tensor)), Memory(name, tensor, N * C * S) {
        if (dtype == INT64) refuse_dtype(name, tensor);
    }

    // The same with the dtype and layout of `x`.
    Values(const char *name, nb::handle tensor, const Values &x) : Values(name, tensor) {
        if (dtype != x.dtype) refuse_dtype(name, tensor);
        if (!(Layout(*this) == x)) refuse(name, "expected the sizes and the layout of x");
    }

  private:
    static Layout dense(const char *name, nb::handle tensor) {
        const std::optional<Layout> of = layout(tensor);
        if (!of) refuse(name, "expected a dense tensor (N, C, *), channels second or innermost");
        return *of;
    }
};

inline void check_length(const char *name, nb::handle tensor, int64_t expected) {
    const int64_t length = integer(call(tensor, torch().numel));
    if (length != expected)
        refuse(name, "expected " + std::to_string(expected) + " values, got " + std::to_string(length));
}

// A vector that is read: of any floating dtype and stride, here in float64.
class Vector {
  public:
    // With `absent` for each value where the tensor is None.
    Vector(const char *name, nb::handle tensor, int64_t length, double absent) {
        if (tensor.is_none())
            std::fill_n(make(length), length, absent);
        else
            read(name, tensor, length);
    }
    Vector(const char *name, nb::handle tensor, int64_t length) { read(name, tensor, length); }
    double operator[](int64_t c) const { return at_[c]; }
    const double *begin() const { return at_; }

  private:
    void read(const char *name, nb::handle tensor, int64_t length) {
        check_length(name, tensor, length);
        owner_ = call(tensor, torch().contiguous);
        Memory of(name, owner_, length);
        if (of.dtype == INT64) refuse_dtype(name, tensor);
        if (of.dtype == FLOAT32) {
            std::copy_n((const float *)of.at, length, make(length));
            return;
        }
        if (of.dtype != FLOAT64) of = Memory(name, owner_ = call(owner_, torch().to_double), length);
        at_ = (const double *)of.at;
    }

    double *make(int64_t length) {
        own_.reset(new double[length]);
        at_ = own_.get();
        return own_.get();
    }

    nb::object owner_;
    std::unique_ptr<double[]> own_;
    const double *at_;
};

// A float64 vector that is written.
inline double *result(const char *name, nb::handle tensor, int64_t length) {
    check_length(name, tensor, length);
    if (!is_true(call(tensor, torch().is_contiguous))) refuse(name, "expected a contiguous tensor");
    const Memory of(name, tensor, length);
    if (of.dtype != FLOAT64) refuse_dtype(name, tensor);
    return (double *)of.at;
}
