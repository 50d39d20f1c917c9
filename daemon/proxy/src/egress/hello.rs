//! Whose name an enclave's TLS asks for: the first words of the connection are read, judged, and given back to be passed on.
//!
//! (With encrypted client hello the name that can be seen is that of the server in front; that one counts.)

use crate::counters::Failure;
use crate::hello::{self, Hello};
use std::time::Duration;
use tokio::io::AsyncRead;

/// Why a connection is not one with that server.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HelloError {
    #[error(transparent)]
    Read(#[from] hello::HelloError),
    #[error("it does not say which server it wants: TLS without SNI")]
    NoName,
    #[error("it asks for the server {0}")]
    OtherName(String),
}

impl HelloError {
    pub(crate) fn failure(&self) -> Failure {
        use hello::HelloError::{Closed, Io, NotTls, TooLong, TooSlow};
        match self {
            Self::Read(NotTls { .. } | Closed | TooLong) => Failure::NotTls,
            Self::Read(TooSlow(_)) => Failure::HelloTimeout,
            Self::Read(Io(_)) => Failure::Reset,
            Self::NoName => Failure::NoServerName,
            Self::OtherName(_) => Failure::OtherServerName,
        }
    }
}

/// Reads until it is known that the client wants this server; everything that was read.
pub(crate) async fn expect(
    client: &mut (impl AsyncRead + Unpin),
    hostname: &str,
    patience: Duration,
) -> Result<Vec<u8>, HelloError> {
    let Hello { accepted, bytes, .. } = hello::read(client, patience).await?;
    judge(accepted.client_hello().server_name(), hostname).map(|()| bytes)
}

fn judge(name: Option<&str>, hostname: &str) -> Result<(), HelloError> {
    let name = name.ok_or(HelloError::NoName)?;
    let bare = |name: &str| name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    if bare(name) == bare(hostname) { Ok(()) } else { Err(HelloError::OtherName(name.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hello::tests::hello;

    async fn said(bytes: &[u8]) -> Result<Vec<u8>, HelloError> {
        let mut client = bytes;
        expect(&mut client, "KMS.us-east-1.amazonaws.com.", Duration::from_secs(5)).await
    }

    #[tokio::test]
    async fn the_right_name_gives_every_byte_back_and_another_or_none_is_refused() {
        let right = hello(Some("kms.us-east-1.amazonaws.com"), 0);
        assert_eq!(said(&right).await.unwrap(), right);
        let other = said(&hello(Some("evil.example.com"), 0)).await.unwrap_err();
        assert!(matches!(&other, HelloError::OtherName(name) if name == "evil.example.com"), "{other}");
        assert_eq!(other.failure(), Failure::OtherServerName);
        assert_eq!(said(&hello(None, 0)).await.unwrap_err().failure(), Failure::NoServerName);
        assert_eq!(said(b"GET / HTTP/1.1\r\n\r\n").await.unwrap_err().failure(), Failure::NotTls);
        assert_eq!(said(b"").await.unwrap_err().failure(), Failure::NotTls);
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_a_failure_of_its_own() {
        let (_silent, mut proxy) = tokio::io::duplex(64);
        let error = expect(&mut proxy, "x", Duration::from_secs(5)).await.unwrap_err();
        assert_eq!(error.failure(), Failure::HelloTimeout);
    }
}
