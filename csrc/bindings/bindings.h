// Declarations for the files of this folder.  Each file adds the functions of one op to fastgan._native; modules.cpp
// adds a walk through torch.nn.Modules.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "common/binding.h"
#include "common/isa.h"

namespace fastgan {

namespace py = pybind11;

// Throws std::invalid_argument for an instruction set that this build or this processor does not support.
Isa isa_of(const std::string& name);

void bind_attention(py::module_& m);
void bind_avg_pool(py::module_& m);
void bind_conv(py::module_& m);
void bind_minibatch_discrimination(py::module_& m);
void bind_minibatch_stddev(py::module_& m);
void bind_bias_act(py::module_& m);
void bind_modules(py::module_& m);
void bind_norm(py::module_& m);
void bind_spectral_norm(py::module_& m);
void bind_upfirdn2d(py::module_& m);

}  // namespace fastgan
