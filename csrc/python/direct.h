// From torch's tensors to a tensor of records, without Python code in between.
#pragma once

#include <Python.h>

namespace numguard {

// Adds to the extension module:
//   prepare(exchange, tensor, parameter, threads) -> bool: whether the calls below can be made. `threads` is called, to
//     tell how many there are, where more than one would help.
//   stay_on_this_thread(): from now on, the scans of this thread run on it alone.
//   scan_tensor(tensor, plan or None, detail, isa) and scan_tensors(list, detail, isa): records, int64 [n, 8]; or None,
//     if a tensor is not on the CPU, or not such that it can be read as it is: the caller then does it in Python.
void add_direct_calls(PyObject* module);

}  // namespace numguard
