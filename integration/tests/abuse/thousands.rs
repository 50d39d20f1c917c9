//! Five thousand connections, held in every way there is: what each costs at most, and all of them.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test that cannot go on has failed; helpers are tests, too"
)]
#![allow(dead_code, reason = "the floods need more of these helpers")]

mod frames;
mod held;
mod proxy;

#[test]
fn five_thousand_connections_that_are_held_in_every_way_cost_no_more_than_they_may() {
    proxy::run(async |proxy| held::hold_of_each_kind(proxy, 625).await);
}
