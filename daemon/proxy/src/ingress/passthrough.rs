//! Sites whose TLS is the enclave's own: every byte goes there as it came, those that were read to find the site included.

use super::handshake::{fatal, say};
use super::https::Https;
use super::proxy_protocol;
use super::sites::Backend;
use super::tcp::{Way, connect_and_relay};
use crate::access_log::{Entry, Protocol};
use crate::counters::{Failure, Meter, Open};
use crate::tcp::may_pause;
use enclaved_core::routes::{Passthrough, ProxyProtocol};
use rustls::AlertDescription;
use std::net::SocketAddr;
use tokio::net::TcpStream;

impl Https {
    /// Carries a connection, of which this much was read, to its end.
    pub(crate) async fn pass_through(
        &self,
        mut client: TcpStream,
        said: Vec<u8>,
        source: SocketAddr,
        backend: &Backend,
        Passthrough { vsock_port, proxy_protocol }: Passthrough,
    ) {
        let open = Open::ingress(&backend.traffic, backend.target.as_ref());
        let mut entry = Entry::begin(&self.shared, Protocol::Tls, source);
        entry.goes_to(&backend.traffic, backend.target.as_deref(), Some(vsock_port));
        let Some(target) = backend.target.clone() else {
            // There is nothing else in TLS for "not now".
            say(&mut client, &fatal(AlertDescription::InternalError)).await;
            return self.not_passed(backend, &mut entry, Failure::NoTarget, Some("no generation of it is ready"));
        };
        // It is a relay from here on, of whose pauses nothing is known.
        may_pause(&client);
        let length = said.len() as u64;
        let before = match (proxy_protocol, client.local_addr()) {
            (None, _) => said,
            (Some(ProxyProtocol::V2), Ok(destination)) => {
                let mut header = proxy_protocol::v2(source, destination);
                header.extend_from_slice(&said);
                header
            }
            // The connection is gone already.
            (Some(ProxyProtocol::V2), Err(_)) => return self.not_passed(backend, &mut entry, Failure::Reset, None),
        };
        entry.beside(&backend.traffic).inwards(length);
        let transport = self.upstreams.transport();
        let limits = &self.shared.limits;
        let (traffic, written) = (&backend.traffic, &entry);
        let way = Way { transport: &transport, target: &target, vsock_port, traffic, entry: written, limits };
        // A token of its own: waiting on a shared one takes its lock at every turn.
        let cut = target.cut.child_token();
        let carried = tokio::select! {
            // Cancel-safe: a token stays cancelled.
            () = cut.cancelled() => Err((Failure::Cut, None)),
            // Not finished is what it must be when the enclave is cut off: dropping it resets the client.
            carried = connect_and_relay(client, Some(before), way, || ()) => carried,
        };
        match carried {
            Ok(()) => entry.connection_ends(None),
            Err((failure, text)) => self.not_passed(backend, &mut entry, failure, text.as_deref()),
        }
        drop(open);
    }

    fn not_passed(&self, backend: &Backend, entry: &mut Entry, failure: Failure, text: Option<&str>) {
        backend.traffic.fail(failure);
        entry.connection_ends(Some(failure));
        if let Some(error) = text
            && let Some(left_out) = self.failures.pass()
        {
            let enclave = &backend.traffic.key().enclave;
            tracing::warn!(%enclave, error, left_out, "a TLS client could not reach its enclave");
        }
    }
}
