//! The first words of a TLS client: reads them, says whose name it asks for, and gives back every byte that was read, to be
//! passed on. What the rest of the connection holds nobody here can see.
//!
//! (With encrypted client hello the name that can be seen is that of the server in front; that one counts.)

use crate::counters::Failure;
use rustls::server::Acceptor;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::timeout;

/// Most bytes that are read before the name is known. Post-quantum key shares take about 1.2 KB each.
const HELLO_BYTES: usize = 32 << 10;

/// Why a connection is not one with that server.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HelloError {
    #[error("it does not begin as TLS does")]
    NotTls(#[source] rustls::Error),
    #[error("it closed before it had said which server it wants")]
    Closed,
    #[error("it said {HELLO_BYTES} bytes without saying which server it wants")]
    TooLong,
    #[error("it did not say within {0:?} which server it wants")]
    TooSlow(Duration),
    #[error("it does not say which server it wants: TLS without SNI")]
    NoName,
    #[error("it asks for the server {0}")]
    OtherName(String),
    #[error("it could not be read")]
    Io(#[source] io::Error),
}

impl HelloError {
    pub(crate) fn failure(&self) -> Failure {
        match self {
            Self::NotTls(_) | Self::Closed | Self::TooLong => Failure::NotTls,
            Self::TooSlow(_) => Failure::HelloTimeout,
            Self::NoName => Failure::NoServerName,
            Self::OtherName(_) => Failure::OtherServerName,
            Self::Io(_) => Failure::Reset,
        }
    }
}

/// Reads until it is known that the client wants this server; everything that was read.
pub(crate) async fn expect(
    client: &mut (impl AsyncRead + Unpin),
    hostname: &str,
    patience: Duration,
) -> Result<Vec<u8>, HelloError> {
    timeout(patience, read(client, hostname)).await.unwrap_or(Err(HelloError::TooSlow(patience)))
}

async fn read(client: &mut (impl AsyncRead + Unpin), hostname: &str) -> Result<Vec<u8>, HelloError> {
    let (mut acceptor, mut bytes) = (Acceptor::default(), Vec::with_capacity(4 << 10));
    loop {
        let known = bytes.len();
        let room = (HELLO_BYTES - known) as u64;
        if room == 0 {
            return Err(HelloError::TooLong);
        }
        let read = (&mut *client).take(room).read_buf(&mut bytes).await.map_err(HelloError::Io)?;
        if read == 0 {
            return Err(HelloError::Closed);
        }
        let mut news = &bytes[known..];
        while !news.is_empty() {
            if acceptor.read_tls(&mut news).map_err(HelloError::Io)? == 0 {
                return Err(HelloError::TooLong);
            }
            match acceptor.accept() {
                Ok(None) => {}
                Ok(Some(accepted)) => return judge(accepted.client_hello().server_name(), hostname).map(|()| bytes),
                Err((error, _)) => return Err(HelloError::NotTls(error)),
            }
        }
    }
}

fn judge(name: Option<&str>, hostname: &str) -> Result<(), HelloError> {
    let name = name.ok_or(HelloError::NoName)?;
    let bare = |name: &str| name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    if bare(name) == bare(hostname) { Ok(()) } else { Err(HelloError::OtherName(name.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::pki_types::ServerName;
    use rustls::{ClientConfig, ClientConnection, RootCertStore};
    use std::sync::Arc;
    use tokio::io::AsyncWriteExt;

    /// What a client says first; with so many bytes of application protocols in it.
    fn hello(name: Option<&str>, padding: usize) -> Vec<u8> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        config.enable_sni = name.is_some();
        config.alpn_protocols = vec![vec![b'x'; 200]; padding / 200];
        let name = ServerName::try_from(name.unwrap_or("other.example.com").to_owned()).unwrap();
        let mut client = ClientConnection::new(Arc::new(config), name).unwrap();
        let mut bytes = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut bytes).unwrap();
        }
        bytes
    }

    /// The bytes come in pieces of this size; the client stays.
    async fn said(bytes: Vec<u8>, piece: usize) -> Result<Vec<u8>, HelloError> {
        let (mut client, mut proxy) = tokio::io::duplex(piece);
        let writer = tokio::spawn(async move {
            // A proxy that has seen enough does not read the rest.
            let _enough = client.write_all(&bytes).await;
            client
        });
        let result = expect(&mut proxy, "KMS.us-east-1.amazonaws.com.", Duration::from_secs(5)).await;
        drop(proxy);
        drop(writer.await);
        result
    }

    #[tokio::test(start_paused = true)]
    async fn the_right_name_gives_every_byte_back_however_they_are_split() {
        for (padding, piece) in [(0, 1), (0, 7), (0, 4096), (2000, 100), (2000, 1500), (12_000, 1448)] {
            let bytes = hello(Some("kms.us-east-1.amazonaws.com"), padding);
            assert!(bytes.len() > padding && (padding == 0 || bytes.len() > 1500));
            assert_eq!(said(bytes.clone(), piece).await.unwrap(), bytes, "{padding} in pieces of {piece}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_after_the_hello_in_the_same_segment_is_given_back_too() {
        let mut bytes = hello(Some("kms.us-east-1.amazonaws.com"), 0);
        bytes.extend_from_slice(b"early data of some kind");
        assert_eq!(said(bytes.clone(), 16 << 10).await.unwrap(), bytes);
    }

    #[tokio::test(start_paused = true)]
    async fn a_hello_in_several_records_is_read_as_one() {
        let whole = hello(Some("kms.us-east-1.amazonaws.com"), 0);
        let (header, message) = whole.split_at(5);
        let mut bytes = Vec::new();
        for part in message.chunks(50) {
            bytes.extend_from_slice(&header[..3]);
            bytes.extend_from_slice(&u16::try_from(part.len()).unwrap().to_be_bytes());
            bytes.extend_from_slice(part);
        }
        assert_eq!(said(bytes.clone(), 64).await.unwrap(), bytes);
    }

    #[tokio::test(start_paused = true)]
    async fn another_name_none_no_tls_and_silence_are_told_apart() {
        let other = said(hello(Some("evil.example.com"), 0), 4096).await.unwrap_err();
        assert!(matches!(&other, HelloError::OtherName(name) if name == "evil.example.com"), "{other}");
        assert_eq!(other.failure(), Failure::OtherServerName);
        assert_eq!(said(hello(None, 0), 4096).await.unwrap_err().failure(), Failure::NoServerName);
        for text in [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), vec![0; 4096], b"SSH-2.0-x\r\n".to_vec()] {
            let error = said(text, 4096).await.unwrap_err();
            assert!(matches!(error, HelloError::NotTls(_)), "{error}");
        }
        let (_silent, mut proxy) = tokio::io::duplex(64);
        let error = expect(&mut proxy, "x", Duration::from_secs(5)).await.unwrap_err();
        assert_eq!(error.failure(), Failure::HelloTimeout);
        let (client, mut proxy) = tokio::io::duplex(64);
        drop(client);
        assert!(matches!(expect(&mut proxy, "x", Duration::from_secs(5)).await, Err(HelloError::Closed)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_hello_without_an_end_is_cut_off_at_the_bound() {
        // A handshake message of the largest length there is, and records of it without an end.
        let mut bytes = vec![22, 3, 1, 0x3f, 0xff, 1, 0, 0xff, 0xff];
        bytes.resize(5 + 0x3fff, 0);
        for _ in 0..4 {
            bytes.extend_from_slice(&[22, 3, 1, 0x3f, 0xff]);
            bytes.resize(bytes.len() + 0x3fff, 0);
        }
        let error = said(bytes, 4096).await.unwrap_err();
        assert_eq!(error.failure(), Failure::NotTls, "{error}");
    }
}
