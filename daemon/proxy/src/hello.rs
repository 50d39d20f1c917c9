//! The first words of a TLS client: reads them into a bounded buffer, has rustls understand them, and keeps every byte. What
//! follows from the name in them is decided by whoever asks; what the rest of the connection holds nobody here can see.

use rustls::server::{Accepted, Acceptor};
use std::io;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::timeout;

/// Most bytes that are read before the name is known. Post-quantum key shares take about 1.2 KB each.
const HELLO_BYTES: usize = 32 << 10;

/// What a client said first.
pub(crate) struct Hello {
    /// As rustls understood it. It goes on from here if the connection is to end here.
    pub(crate) accepted: Accepted,
    /// Every byte that was read, to be passed on if the connection is to end elsewhere.
    pub(crate) bytes: Vec<u8>,
    /// So many of them rustls has.
    pub(crate) understood: usize,
}

/// Why nothing was understood.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HelloError {
    #[error("it does not begin as TLS does")]
    NotTls {
        #[source]
        source: rustls::Error,
        /// What TLS has to say to that.
        alert: Vec<u8>,
    },
    #[error("it closed before it had said which server it wants")]
    Closed,
    #[error("it said {HELLO_BYTES} bytes without saying which server it wants")]
    TooLong,
    #[error("it did not say within {0:?} which server it wants")]
    TooSlow(Duration),
    #[error("it could not be read")]
    Io(#[source] io::Error),
}

/// Reads until the client has said which server it wants.
pub(crate) async fn read(client: &mut (impl AsyncRead + Unpin), patience: Duration) -> Result<Hello, HelloError> {
    timeout(patience, read_patiently(client)).await.unwrap_or(Err(HelloError::TooSlow(patience)))
}

async fn read_patiently(client: &mut (impl AsyncRead + Unpin)) -> Result<Hello, HelloError> {
    let (mut acceptor, mut bytes) = (Acceptor::default(), Vec::with_capacity(2 << 10));
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
                Ok(Some(accepted)) => {
                    let understood = bytes.len() - news.len();
                    return Ok(Hello { accepted, bytes, understood });
                }
                Err((source, mut answer)) => {
                    let mut alert = Vec::new();
                    // Writing to memory does not fail.
                    drop(answer.write_all(&mut alert));
                    return Err(HelloError::NotTls { source, alert });
                }
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use rustls::pki_types::ServerName;
    use rustls::{ClientConfig, ClientConnection, RootCertStore};
    use std::sync::Arc;
    use tokio::io::AsyncWriteExt;

    /// What a client says first; with so many bytes of application protocols in it.
    pub(crate) fn hello(name: Option<&str>, padding: usize) -> Vec<u8> {
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
    async fn said(bytes: Vec<u8>, piece: usize) -> Result<Hello, HelloError> {
        let (mut client, mut proxy) = tokio::io::duplex(piece);
        let writer = tokio::spawn(async move {
            // A proxy that has seen enough does not read the rest.
            let _enough = client.write_all(&bytes).await;
            client
        });
        let result = read(&mut proxy, Duration::from_secs(5)).await;
        drop(proxy);
        drop(writer.await);
        result
    }

    #[tokio::test(start_paused = true)]
    async fn every_byte_is_kept_however_they_are_split() {
        for (padding, piece) in [(0, 1), (0, 7), (0, 4096), (2000, 100), (2000, 1500), (12_000, 1448)] {
            let bytes = hello(Some("kms.us-east-1.amazonaws.com"), padding);
            assert!(bytes.len() > padding && (padding == 0 || bytes.len() > 1500));
            let Hello { accepted, bytes: kept, understood } = said(bytes.clone(), piece).await.ok().unwrap();
            assert_eq!(accepted.client_hello().server_name(), Some("kms.us-east-1.amazonaws.com"));
            assert_eq!((kept, understood), (bytes.clone(), bytes.len()), "{padding} in pieces of {piece}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_after_it_in_the_same_segment_is_kept_too() {
        let mut bytes = hello(Some("kms.us-east-1.amazonaws.com"), 0);
        bytes.extend_from_slice(b"early data of some kind");
        assert_eq!(said(bytes.clone(), 16 << 10).await.ok().unwrap().bytes, bytes);
        bytes.resize(10_000, b'x');
        let hello = said(bytes.clone(), 16 << 10).await.ok().unwrap();
        assert!(hello.understood <= hello.bytes.len() && bytes.starts_with(&hello.bytes));
    }

    #[tokio::test(start_paused = true)]
    async fn one_in_several_records_is_read_as_one() {
        let whole = hello(Some("kms.us-east-1.amazonaws.com"), 0);
        let (header, message) = whole.split_at(5);
        let mut bytes = Vec::new();
        for part in message.chunks(50) {
            bytes.extend_from_slice(&header[..3]);
            bytes.extend_from_slice(&u16::try_from(part.len()).unwrap().to_be_bytes());
            bytes.extend_from_slice(part);
        }
        assert_eq!(said(bytes.clone(), 64).await.ok().unwrap().bytes, bytes);
    }

    #[tokio::test(start_paused = true)]
    async fn no_tls_gets_an_alert_and_silence_an_end() {
        for text in [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), vec![0; 4096], b"SSH-2.0-x\r\n".to_vec()] {
            let Some(HelloError::NotTls { alert, .. }) = said(text, 4096).await.err() else { panic!("taken for TLS") };
            assert!(alert.starts_with(&[21, 3]) && alert.len() == 7, "{alert:?}");
        }
        let (_silent, mut proxy) = tokio::io::duplex(64);
        assert!(matches!(read(&mut proxy, Duration::from_secs(5)).await, Err(HelloError::TooSlow(_))));
        let (client, mut proxy) = tokio::io::duplex(64);
        drop(client);
        assert!(matches!(read(&mut proxy, Duration::from_secs(5)).await, Err(HelloError::Closed)));
    }

    #[tokio::test(start_paused = true)]
    async fn one_without_an_end_is_cut_off_at_the_bound() {
        // A handshake message of the largest length there is, and records of it without an end.
        let mut bytes = vec![22, 3, 1, 0x3f, 0xff, 1, 0, 0xff, 0xff];
        bytes.resize(5 + 0x3fff, 0);
        for _ in 0..4 {
            bytes.extend_from_slice(&[22, 3, 1, 0x3f, 0xff]);
            bytes.resize(bytes.len() + 0x3fff, 0);
        }
        assert!(matches!(said(bytes, 4096).await, Err(HelloError::TooLong)));
    }
}
