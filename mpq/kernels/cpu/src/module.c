/* An empty Python module: importing mpq.kernels.cpu._native locates the library, which ctypes then calls. */
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", "Compiled kernels.", -1, NULL,
                                        NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&definition); }
