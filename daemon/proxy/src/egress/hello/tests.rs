use super::super::records::record;
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
    result.map(|(bytes, _)| bytes)
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
    bytes.extend_from_slice(&record(23, b"early data of some kind"));
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
        assert!(matches!(error, HelloError::NotTls), "{error}");
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

const NAME: &str = "kms.us-east-1.amazonaws.com";

/// What comes of all that a client says, in pieces of that size.
fn judged(said: &[u8], piece: usize) -> Result<u32, HelloError> {
    let mut hellos = Hellos::new(NAME);
    said.chunks(piece).try_for_each(|piece| hellos.take(piece))?;
    Ok(hellos.judged)
}

#[test]
fn a_second_hello_is_judged_like_the_first_whatever_comes_between() {
    let (right, other) = (hello(Some(NAME), 0), hello(Some("evil.example.com"), 0));
    let between = [record(20, &[1]), record(23, &[0; 5000]), record(21, &[1, 0])].concat();
    for piece in [1, 100, 1 << 20] {
        assert_eq!(judged(&[&right[..], &between, &right].concat(), piece).unwrap(), 2);
        for second in [&other, &hello(None, 0)] {
            let error = judged(&[&right[..], &between, second].concat(), piece).unwrap_err();
            assert!(matches!(error, HelloError::OtherName(_) | HelloError::NoName), "{error}");
        }
        // Both in one record.
        let one = record(22, &[&right[5..], &other[5..]].concat());
        assert!(matches!(judged(&one, piece), Err(HelloError::OtherName(_))));
    }
}

#[test]
fn nothing_of_a_hello_for_another_server_is_whole_before_it_is_refused() {
    let said = [hello(Some(NAME), 0), hello(Some("evil.example.com"), 2000)].concat();
    let mut hellos = Hellos::new(NAME);
    let refused = said.iter().position(|byte| hellos.take(&[*byte]).is_err());
    assert_eq!(refused, Some(said.len() - 1));
}

#[test]
fn a_client_that_says_hello_again_and_again_or_says_something_else_in_clear_is_refused() {
    let right = hello(Some(NAME), 0);
    assert!(matches!(judged(&[&right[..], &right, &right].concat(), 1000), Err(HelloError::Again)));
    for more in [record(22, &[16, 0, 0, 1, 0]), record(22, &[1, 0, 0, 0]), b"GET / HTTP/1.1".to_vec()] {
        assert!(matches!(judged(&[&right[..], &more].concat(), 1000), Err(HelloError::NotTls)));
    }
}
