// Work done, counted so that another process can tell slow from stuck.
#pragma once

#include "qwen1m/job.h"

namespace qwen1m {

// One tile of work is done: called by every thread of a kernel, every few milliseconds.
void advance();

// As qwen1m_read_progress; without asking the GPU, of which it says what was known last.
qwen1m_progress known_progress();

// From now on the end of this process by exit is told before whatever was set up so far is taken down.
void tell_exit_first();

}  // namespace qwen1m
