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

// DLPack's description of a tensor, and the table of functions by which a type of tensors gives it out: version 1.3 of
// the specification, https://dmlc.github.io/dlpack/latest/c_api.html.
namespace dlpack {
struct Device {
    int32_t type, id;
};
struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
};
struct Tensor {
    void *data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};
struct Exchange {
    struct {
        uint32_t major, minor;
    } version;
    Exchange *previous;
    void *allocate, *take, *give;
    int (*describe)(void *object, Tensor *out);  // lent: as long as `object` lives unchanged
    void *stream;
};
enum { CPU = 1, INT = 0, FLOAT = 2, BFLOAT = 4 };
}  // namespace dlpack

// What a tensor is asked for, in names that Python has interned: half the time of an attribute by its spelling.
struct Torch {
    PyObject *data_ptr = name("data_ptr"), *shape = name("shape"), *stride = name("stride"), *dtype = name("dtype"),
             *is_cpu = name("is_cpu"), *contiguous = name("contiguous"), *to_double = name("double"),
             *copy = name("copy_"), *clone = name("clone");
    PyObject *dtypes[KNOWN];
    PyTypeObject *tensor;
    const dlpack::Exchange *exchange = nullptr;  // torch has it from 2.10 on

    Torch() {
        const nb::module_ torch = nb::module_::import_("torch");
        int k = 0;
        for (const char *of : {"float32", "float64", "bfloat16", "float16", "int64"})
            dtypes[k++] = nb::object(torch.attr(of)).release().ptr();
        const nb::object type = torch.attr("Tensor");
        tensor = (PyTypeObject *)type.ptr();
        const nb::object capsule = nb::getattr(type, "__dlpack_c_exchange_api__", nb::none());
        if (!capsule.is_none())
            exchange = (const dlpack::Exchange *)PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
        if (PyErr_Occurred()) throw nb::python_error();
        while (exchange && (exchange->version.major != 1 || !exchange->describe)) exchange = exchange->previous;
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

// As PyObject_CallMethodNoArgs and PyObject_CallMethodOneArg, which Python's stable ABI lacks.
template <typename... Arguments> PyObject *call_method(nb::handle of, PyObject *name, Arguments... arguments) {
    PyObject *all[] = {of.ptr(), arguments...};
    return PyObject_VectorcallMethod(name, all, std::size(all) | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
}
inline nb::object call(nb::handle of, PyObject *name) { return checked(call_method(of, name)); }
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

// What a tensor says of itself: all of it in one call where torch offers that, at a tenth of the time.
struct Tensor {
    void *at = nullptr;  // stays so where there is no memory
    int dtype = 0;  // a DType, INT64, or KNOWN for any other
    bool on_cpu;
    Py_ssize_t dims;
    const int64_t *sizes, *strides;  // of the tensor, which the caller keeps unchanged

    explicit Tensor(nb::handle tensor) {
        if (!described(tensor)) read(tensor);
    }
    Tensor(const Tensor &) = delete;

    int64_t length() const {
        int64_t length = 1;
        for (Py_ssize_t d = 0; d < dims; d++) length *= sizes[d];
        return length;
    }

    bool is_contiguous() const {
        int64_t step = 1;
        for (Py_ssize_t d = dims; d-- > 0; step *= sizes[d])
            if (sizes[d] != 1 && strides[d] != step) return false;
        return true;
    }

  private:
    bool described(nb::handle tensor) {
        if (!torch().exchange || !PyObject_TypeCheck(tensor.ptr(), torch().tensor)) return false;
        dlpack::Tensor of;
        if (torch().exchange->describe(tensor.ptr(), &of) != 0) {  // a wrapper without memory, a meta tensor
            PyErr_Clear();
            return false;
        }
        const int code = of.dtype.code, bits = of.dtype.bits;
        at = of.data ? (char *)of.data + of.byte_offset : nullptr;
        dtype = code == dlpack::FLOAT && bits == 32    ? FLOAT32
                : code == dlpack::FLOAT && bits == 64  ? FLOAT64
                : code == dlpack::FLOAT && bits == 16  ? FLOAT16
                : code == dlpack::BFLOAT && bits == 16 ? BFLOAT16
                : code == dlpack::INT && bits == 64    ? INT64
                                                       : KNOWN;
        on_cpu = of.device.type == dlpack::CPU;
        dims = of.ndim, sizes = of.shape, strides = of.strides;
        return true;
    }

    void read(nb::handle tensor) {
        on_cpu = is_true(get(tensor, torch().is_cpu));
        const nb::object of = get(tensor, torch().dtype);
        while (dtype < KNOWN && of.ptr() != torch().dtypes[dtype]) dtype++;
        const nb::object shape = get(tensor, torch().shape), stride = call(tensor, torch().stride);
        dims = PyTuple_Size(shape.ptr());
        own_.reset(new int64_t[2 * dims]);
        for (Py_ssize_t d = 0; d < dims; d++) {
            own_[d] = integer(PyTuple_GetItem(shape.ptr(), d));
            own_[dims + d] = integer(PyTuple_GetItem(stride.ptr(), d));
        }
        sizes = own_.get(), strides = sizes + dims;
        if (!on_cpu) return;
        const nb::object address = nb::steal(call_method(tensor, torch().data_ptr));
        if (address) at = PyLong_AsVoidPtr(address.ptr());
        PyErr_Clear();  // a wrapper of torch.func has none
    }

    std::unique_ptr<int64_t[]> own_;
};

// Where the values of a tensor begin, and their dtype: a DType, or INT64.
struct Memory {
    void *at;
    int dtype;

    Memory(const char *name, nb::handle tensor, const Tensor &of) : at(of.at), dtype(of.dtype) {
        if (!of.on_cpu) refuse(name, "expected a tensor on the CPU");
        if (dtype == KNOWN) refuse_dtype(name, tensor);
        if (!at && of.length()) refuse(name, "has no memory of its own: a wrapper, or its storage was freed");
    }
};

// How a dense (N, C, *) lies in memory: planes (N, C, S) or, channels innermost, rows (N·S, C, 1).
struct Layout {
    int64_t N, C, S;
    bool operator==(const Layout &other) const { return N == other.N && C == other.C && S == other.S; }
};

// None where the tensor is neither.
inline std::optional<Layout> layout(const Tensor &tensor) {
    if (tensor.dims < 2) return {};
    int64_t step = 1, inner = 1;
    const auto follows = [&](Py_ssize_t d) {  // the next in memory?
        const bool dense = tensor.sizes[d] == 1 || tensor.strides[d] == step;
        step *= tensor.sizes[d];
        return dense;
    };
    bool planes = true, rows = true;
    for (Py_ssize_t d = tensor.dims - 1; d >= 2; d--) planes = follows(d) && planes, inner *= tensor.sizes[d];
    planes = follows(1) && planes;
    planes = follows(0) && planes;
    const int64_t N = tensor.sizes[0], C = tensor.sizes[1];
    if (step == 0) return Layout{0, C, 1};
    if (planes) return Layout{N, C, inner};
    step = 1;
    rows = follows(1);
    for (Py_ssize_t d = tensor.dims - 1; d >= 2; d--) rows = follows(d) && rows;
    rows = follows(0) && rows;
    if (rows) return Layout{N * inner, C, 1};
    return {};
}

// x, dy, or a result of their size: dense, of a dtype of the loops.
struct Values : Layout, Memory {
    Values(const char *name, nb::handle tensor) : Values(name, tensor, Tensor(tensor)) {}

    // The same with the dtype and layout of `x`.
    Values(const char *name, nb::handle tensor, const Values &x) : Values(name, tensor) {
        if (dtype != x.dtype) refuse_dtype(name, tensor);
        if (!(Layout(*this) == x)) refuse(name, "expected the sizes and the layout of x");
    }

  private:
    Values(const char *name, nb::handle tensor, const Tensor &of) : Layout(dense(name, of)), Memory(name, tensor, of) {
        if (dtype == INT64) refuse_dtype(name, tensor);
    }

    static Layout dense(const char *name, const Tensor &tensor) {
        const std::optional<Layout> of = layout(tensor);
        if (!of) refuse(name, "expected a dense tensor (N, C, *), channels second or innermost");
        return *of;
    }
};

inline void check_length(const char *name, const Tensor &tensor, int64_t expected) {
    const int64_t length = tensor.length();
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
        const Tensor given(tensor);
        check_length(name, given, length);
        Memory memory(name, tensor, given);
        if (memory.dtype == INT64) refuse_dtype(name, tensor);
        if (memory.dtype > FLOAT64 || !given.is_contiguous()) {
            owner_ = call(call(tensor, torch().to_double), torch().contiguous);
            memory = Memory(name, owner_, Tensor(owner_));
        }
        if (memory.dtype == FLOAT32)
            std::copy_n((const float *)memory.at, length, make(length));
        else
            at_ = (const double *)memory.at;
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
    const Tensor given(tensor);
    check_length(name, given, length);
    const Memory of(name, tensor, given);
    if (of.dtype != FLOAT64) refuse_dtype(name, tensor);
    if (!given.is_contiguous()) refuse(name, "expected a contiguous tensor");
    return (double *)of.at;
}

// One of the fields of a NamedTuple.
inline nb::handle field(const char *name, nb::handle fields, Py_ssize_t length, Py_ssize_t k) {
    if (!PyTuple_Check(fields.ptr()) || PyTuple_Size(fields.ptr()) != length)
        refuse(name, "expected a tuple of " + std::to_string(length));
    return PyTuple_GetItem(fields.ptr(), k);
}
