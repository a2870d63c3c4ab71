// What XLA may call, by name: handlers of its foreign function interface.
#pragma once

namespace capibara {

struct Handler {
    const char* name;
    void* function;
};

void* few_rows_function();    // of ffi_generation.cpp

const Handler* handlers();  // a null name stands behind the last one

}  // namespace capibara
