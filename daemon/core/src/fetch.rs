//! How an image is downloaded: which part is asked for next, what the failure of a part means, how long is waited, when it
//! is given up. Decisions only: no request is made and no file is touched here.
//!
//! A download is a table of [`Parts`] of one object, which is pinned by its ETag. Each part is asked for on its own, by as many
//! requests at once as the daemon likes. What a request that failed means is a [`Cause`]; a part's [`Tries`] turn it into a
//! [`Verdict`]. [`lags`] says which of several requests is so much slower than the others that another one does better.

mod parts;
mod tries;

pub use parts::{MAX_PARTS, Part, Parts, PartsError, part_size};
pub use tries::{Cause, MAX_ANEW, MAX_LOOKS, MAX_TRIES, STALL, Speed, Tries, Verdict, lags, pause};
