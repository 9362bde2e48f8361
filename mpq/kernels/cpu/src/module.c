/* An empty Python module: `import mpq.kernels.cpu._native` says where the library is; ctypes calls it. */
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", "Compiled kernels.", -1, NULL,
                                        NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&definition); }
