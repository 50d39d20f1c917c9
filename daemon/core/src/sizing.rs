//! What a host has for enclaves, and whether the wanted ones fit: decided from its inventory before anything is tried, with the
//! numbers and the way out in every refusal.
//!
//! Pure. The room that running enclaves leave in an existing pool is another question: `plan::admission`.
