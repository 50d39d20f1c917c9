//! The beginning of a connection on the HTTPS port: whom the client wants to reach, and whether its TLS ends here or goes to
//! the enclave as it is. Every one that comes to nothing is counted by its cause.

use super::client::ClientStream;
use super::client_ca::{Checked, ClientCertificate};
use super::https::Https;
use super::sites::Backend;
use crate::counters::Handshake;
use crate::hello::{self, Hello, HelloError};
use bytes::Bytes;
use enclaved_core::routes::Passthrough;
use rustls::{AlertDescription, HandshakeKind};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::StartHandshake;
use tokio_rustls::server::TlsStream;

/// How long a client may take to take seven bytes.
const ALERT: Duration = Duration::from_secs(1);

/// A connection whose client is understood.
pub(crate) enum Begun {
    /// Its TLS ends here.
    Here(Box<TlsStream<ClientStream<TcpStream>>>, Option<Checked>),
    /// Its TLS is the enclave's.
    There {
        client: TcpStream,
        /// What was read of it.
        said: Vec<u8>,
        backend: Arc<Backend>,
        passthrough: Passthrough,
    },
}

impl Https {
    /// Takes a connection up to the end of its handshake, or to where it becomes the enclave's.
    pub(crate) async fn begin(&self, mut client: TcpStream) -> Result<Begun, Handshake> {
        let limits = &self.shared.limits;
        let until = Instant::now() + limits.handshake;
        let Hello { accepted, bytes, understood } = match hello::read(&mut client, limits.handshake).await {
            Ok(hello) => hello,
            Err(HelloError::NotTls { source, alert }) => {
                say(&mut client, &alert).await;
                return Err(cause(&source, Handshake::NotTls));
            }
            Err(HelloError::TooLong) => return Err(Handshake::NotTls),
            Err(HelloError::TooSlow(_)) => return Err(Handshake::Timeout),
            Err(HelloError::Closed | HelloError::Io(_)) => return Err(Handshake::Closed),
        };
        let sites = self.sites.get();
        let Some((domain, backend)) = sites.for_client(accepted.client_hello().server_name()) else {
            say(&mut client, &fatal(AlertDescription::UnrecognisedName)).await;
            return Err(Handshake::UnknownName);
        };
        if let Some(passthrough) = backend.passthrough {
            return Ok(Begun::There { client, said: bytes, backend: backend.clone(), passthrough });
        }
        if self.certificates.certificate(domain).is_none() {
            say(&mut client, &fatal(AlertDescription::InternalError)).await;
            return Err(Handshake::NoCertificate);
        }
        // Chosen by the site as it is now, with tickets of its own. Should the site begin to demand certificates while the
        // handshake goes on, its requests are refused by what was agreed here.
        let (tls, checks) = match &backend.client_ca {
            None => (self.tls.clone(), None),
            Some(demand) => match self.client_cas.check(demand) {
                Some(check) => (check.config.clone(), Some((demand.clone(), check))),
                None => {
                    say(&mut client, &fatal(AlertDescription::InternalError)).await;
                    return Err(Handshake::NoClientCa);
                }
            },
        };
        drop(sites);
        let ahead = Bytes::from(bytes).split_off(understood);
        let client = ClientStream::new(client, ahead, limits.client_stall);
        let handshake = StartHandshake::from_parts(accepted, client).into_stream(tls);
        match timeout_at(until, handshake).await {
            Ok(Ok(stream)) => {
                let Some((demand, check)) = checks else { return Ok(Begun::Here(Box::new(stream), None)) };
                // rustls has let nobody in without one.
                let session = stream.get_ref().1;
                let chain = session.peer_certificates().unwrap_or_default();
                let leaf = chain.first().ok_or(Handshake::NoClientCertificate)?;
                if session.handshake_kind() == Some(HandshakeKind::Resumed) && !check.still_good(chain) {
                    return Err(Handshake::ClientCertificate);
                }
                let certificate = ClientCertificate::new(leaf);
                let checked = Checked { demand, certificate, replaced: check.replaced.clone() };
                Ok(Begun::Here(Box::new(stream), Some(checked)))
            }
            Ok(Err(error)) => Err(cause_of_io(&error)),
            Err(_) => Err(Handshake::Timeout),
        }
    }
}

/// A fatal alert, as it is written before anything is encrypted (RFC 8446, 6).
pub(crate) fn fatal(alert: AlertDescription) -> [u8; 7] {
    const ALERT: u8 = 21;
    const FATAL: u8 = 2;
    [ALERT, 3, 3, 0, 2, FATAL, u8::from(alert)]
}

/// Says something to a client that is given up. Whether it hears it is its own affair.
pub(crate) async fn say(client: &mut TcpStream, bytes: &[u8]) {
    let said = timeout(ALERT, async {
        client.write_all(bytes).await?;
        client.shutdown().await
    });
    drop(said.await);
}

fn cause_of_io(error: &io::Error) -> Handshake {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    tls.map_or(Handshake::Closed, |error| cause(error, Handshake::Other))
}

fn cause(error: &rustls::Error, other: Handshake) -> Handshake {
    use rustls::Error::{
        AlertReceived, InvalidCertificate, NoApplicationProtocol, NoCertificatesPresented, PeerIncompatible,
    };
    match error {
        PeerIncompatible(_) | NoApplicationProtocol => Handshake::Incompatible,
        NoCertificatesPresented => Handshake::NoClientCertificate,
        // Only clients show some here.
        InvalidCertificate(_) => Handshake::ClientCertificate,
        AlertReceived(
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA,
        ) => Handshake::CertificateRefused,
        _ => other,
    }
}
