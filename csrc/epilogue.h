// What follows the normalisation: the four fields of Epilogue in syncbn/_epilogue.py.
#pragma once

#include "tensors.h"

struct Epilogue {
    Vector weight, bias;
    const void *residual = nullptr;
    Activation activation = IDENTITY;
    double slope = 0;

    Epilogue(nb::handle fields, const Values &x)
        : weight("weight", field("epilogue", fields, 4, 0), x.C, 1),
          bias("bias", field("epilogue", fields, 4, 1), x.C, 0) {
        const nb::handle of_residual = field("epilogue", fields, 4, 2), of_activation = field("epilogue", fields, 4, 3);
        if (!of_residual.is_none()) residual = Values("residual", of_residual, x).at;
        if (of_activation.is_none()) return;
        activation = named(field("activation", of_activation, 2, 0));
        slope = PyFloat_AsDouble(field("activation", of_activation, 2, 1).ptr());
        if (PyErr_Occurred()) throw nb::python_error();
    }

  private:
    static Activation named(nb::handle name) {
        const char *const names[] = {"", "relu", "leaky_relu", "silu", "hardswish"};  // in the order of Activation
        for (int k = RELU; k < ACTIVATIONS; k++)
            if (PyUnicode_Check(name.ptr()) && PyUnicode_CompareWithASCIIString(name.ptr(), names[k]) == 0)
                return Activation(k);
        refuse("activation", std::string("unknown: ") + nb::repr(name).c_str());
    }
};
