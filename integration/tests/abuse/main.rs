//! What no client may do to the HTTPS ingress, however it speaks HTTP/2: take it down, keep others waiting, or make it grow. The
//! process is the real one, with the limits of a real host; its memory and processor time are what the kernel says. How long slow
//! clients are waited for is tested within `enclaved-proxy`, with shorter limits.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test that cannot go on has failed; helpers are tests, too"
)]

mod ahead;
mod floods;
mod frames;
mod held;
mod proxy;

#[test]
fn connections_that_are_held_in_every_way_cost_no_more_than_they_may() {
    proxy::run(async |proxy| held::hold_of_each_kind(proxy, 100).await);
}
