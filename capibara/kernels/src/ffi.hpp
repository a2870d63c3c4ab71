// What XLA may call, by name: handlers of its foreign function interface.
#pragma once

namespace capibara {

struct Handler {
    const char* name;
    void* function;
};

const Handler* handlers();  // a null name stands behind the last one

}  // namespace capibara
