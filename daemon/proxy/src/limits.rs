//! The bounds of the data plane: how long it waits, how much it holds. One place, so that an operator's question "why was
//! this cut" has one answer. No behaviour lives here.

use enclaved_core::routes::{Ages, EgressLimits};
use std::time::Duration;

/// The bounds. [`Limits::default`] is what a host runs with; tests shorten the waits.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Limits {
    /// How long a listener, or the link, that could not be opened waits before it is tried again.
    pub retry: Duration,
    /// The time between two rounds of maintenance: certificates, idle connections, routes that are not on disk yet.
    pub maintenance: Duration,
    /// How long whoever hands routes over waits for the disk that they are saved on, and for certificates. They are served before
    /// that.
    pub settle: Duration,
    /// How long requests in flight may go on after the proxy was told to end.
    pub drain: Duration,
    /// How long a connection that has asked nothing yet may take to do so after that: what a client sends right after connecting may be
    /// on its way, and no client asks twice what a new connection swallowed. Part of the drain.
    pub first_request: Duration,
    /// Bytes that a relay reads at once, and the most that it holds for one direction of a connection whose receiver is slow.
    /// `bench relay --buffers` compares sizes.
    pub relay_buffer: usize,
    /// A relayed connection without a byte in either direction ends after this. Long: database pools keep connections for
    /// hours, and a dead peer is found by its silence within minutes ([`Self::peer_silence`]).
    pub relay_idle: Duration,
    /// A TCP peer is gone that gives no sign of life for this long: it answers no keepalive probe; or, unless it is a client that
    /// may pause ([`Stalled`](crate::tcp::Stalled)), it neither acknowledges nor takes what waits for it. Two seconds at least. Below the 350 s after which AWS's NAT gateways and load balancers forget a
    /// silent connection, which the probes keep from being silent.
    pub peer_silence: Duration,
    /// A relayed connection that is closed in one direction ends when the other has been silent for this long.
    pub relay_half_closed: Duration,
    /// A relayed connection ends when it is this old, whatever it carries. None: it may become as old as it likes, as
    /// database pools and log streams do.
    pub relay_lifetime: Option<Duration>,
    /// How long a connection waits for the first answer to its upstream's name. Later ones wait for none.
    pub resolve: Duration,
    /// How long one address of an upstream may take to accept a connection.
    pub connect: Duration,
    /// An address that has not answered for this long does not keep the next from being tried beside it (RFC 8305, 5: the
    /// connection attempt delay, 250 ms).
    pub next_attempt: Duration,
    /// How long reaching an upstream may take in all, over all its addresses.
    pub dial: Duration,
    /// Connections of one egress endpoint at a time; more are closed at once. (Where the routes say nothing else.)
    pub egress_connections: usize,
    /// New connections of one egress endpoint a second; more wait, for a second at most, and are closed at once if that is
    /// not enough. (Where the routes say nothing else.)
    pub egress_rate: u32,
    /// How long an enclave may take to say which TLS server it wants, where that matters.
    pub egress_hello: Duration,
    /// Connections of one raw TCP port at a time; more are closed at once. (Where the routes say nothing else.)
    pub tcp_connections: usize,
    /// HTTPS connections at a time; more are closed at once. (Where the routes say nothing else.)
    pub https_connections: u32,
    /// HTTPS connections of one source at a time; more are closed at once. (Where the routes say nothing else.)
    pub https_source_connections: u32,
    /// How long a client may take for its TLS handshake.
    pub handshake: Duration,
    /// How long a client may take to send a request's headers, and may keep an idle connection open.
    pub request_head: Duration,
    /// How long a client may be silent within a request's body.
    pub request_body: Duration,
    /// Bytes of a request's headers, in all.
    pub request_head_bytes: usize,
    /// Requests of one HTTP/2 connection at a time.
    pub http2_streams: u32,
    /// A client that takes no byte of a response for this long is cut off.
    pub client_stall: Duration,
    /// HTTPS requests in flight to one enclave; more are answered 503.
    pub requests_per_enclave: u64,
    /// How long an enclave may be silent, neither taking the request's body nor answering, before the client gets 504.
    pub answer: Duration,
    /// Idle connections kept to one port of an enclave.
    pub pool_connections: usize,
    /// How long an idle connection to an enclave is kept.
    pub pool_idle: Duration,
}

impl Limits {
    /// These, with what a route says of its own connections.
    pub(crate) fn aged(&self, ages: Ages) -> Self {
        let seconds = |seconds: u32| Duration::from_secs(seconds.into());
        Self {
            relay_idle: ages.idle_s.map_or(self.relay_idle, seconds),
            // An end that is closed makes no silence last longer.
            relay_half_closed: ages
                .idle_s
                .map_or(self.relay_half_closed, |idle| self.relay_half_closed.min(seconds(idle))),
            relay_lifetime: ages.lifetime_s.map(seconds).or(self.relay_lifetime),
            ..self.clone()
        }
    }

    /// These, with what an egress route says of its own.
    pub(crate) fn of_egress(&self, limits: &EgressLimits) -> Self {
        let connect = limits.connect_timeout_ms.map_or(self.connect, |ms| Duration::from_millis(ms.into()));
        // A second address has its chance, too.
        let dial = if connect > self.connect { self.dial.max(connect + self.connect) } else { self.dial };
        Self { connect, dial, ..self.aged(limits.ages) }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            retry: Duration::from_secs(3),
            maintenance: Duration::from_secs(5),
            settle: Duration::from_secs(5),
            drain: Duration::from_secs(5),
            first_request: Duration::from_secs(1),
            relay_buffer: 64 << 10,
            relay_idle: Duration::from_secs(24 * 3600),
            peer_silence: Duration::from_secs(120),
            relay_half_closed: Duration::from_secs(600),
            relay_lifetime: None,
            resolve: Duration::from_secs(5),
            connect: Duration::from_secs(10),
            next_attempt: Duration::from_millis(250),
            dial: Duration::from_secs(15),
            egress_connections: 4096,
            egress_rate: 1000,
            egress_hello: Duration::from_secs(10),
            tcp_connections: 4096,
            https_connections: 8192,
            https_source_connections: 1024,
            handshake: Duration::from_secs(10),
            request_head: Duration::from_secs(30),
            request_body: Duration::from_secs(60),
            request_head_bytes: 32 << 10,
            http2_streams: 128,
            client_stall: Duration::from_secs(120),
            requests_per_enclave: 4096,
            answer: Duration::from_secs(300),
            pool_connections: 64,
            pool_idle: Duration::from_secs(60),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What README says of them, where they are promised: change both.
    #[test]
    fn slow_clients_of_https_are_waited_for_as_long_as_operators_are_told() {
        let Limits { handshake, request_head, request_body, client_stall, answer, .. } = Limits::default();
        let seconds = [handshake, request_head, request_body, client_stall, answer].map(|limit| limit.as_secs());
        assert_eq!(seconds, [10, 30, 60, 120, 300]);
    }
}
