// The handlers of attention, as XLA wants to be given them.
#pragma once

namespace capibara {

void* attention_forward_call();
void* attention_backward_call();

}  // namespace capibara
