#include "cpu/rowwise/body.h"

BERTKERN_DEFINE_ROWS(portable)
