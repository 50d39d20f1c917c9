//! The data plane as its neighbours see it: a control process on the link, clients on TCP and HTTPS, enclaves over hybrid
//! vsock, upstreams on loopback. Everything real but the enclaves, which are tasks of the test.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed; helpers are tests, too")]

mod abuse;
mod access_log;
mod caution;
mod client_certificates;
mod continuity;
mod corpus;
mod draining;
mod egress;
mod faults;
mod features;
mod https;
mod link;
mod names;
mod pool;
mod routes;
mod rules;
mod sharing;
mod slow;
mod support;
mod tcp;
mod vanished;
