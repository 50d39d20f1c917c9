//! Which addresses an enclave may reach through its egress endpoints (invariant 6). Resolving names happens elsewhere.
