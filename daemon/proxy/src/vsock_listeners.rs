//! Which ports of AF_VSOCK somebody on this host listens on, as the kernel's monitoring of sockets tells it (sock_diag(7); what is vsock's
//! own in it stands in linux/vm_sockets_diag.h, and is built as the module vsock_diag). Nothing is bound, listened on or connected.

use rustix::net::netlink::{SOCK_DIAG, SocketAddrNetlink};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with};
use std::collections::BTreeSet;
use std::io;
use std::time::Duration;

/// The kernel answers at once.
const PATIENCE: Duration = Duration::from_secs(2);
/// No message of the kernel's is longer.
const MESSAGE: usize = 64 * 1024;

/// Of linux/netlink.h and linux/sock_diag.h.
const HEADER: usize = 16;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// A request for all there are.
const REQUEST_DUMP: u16 = 0x301;
/// `TCP_LISTEN`, which vsock uses, too.
const LISTEN: u8 = 10;

/// The ports.
///
/// # Errors
/// The kernel can't tell: it has no vsock, or no module vsock_diag (`NotFound`).
pub fn vsock_listeners() -> io::Result<BTreeSet<u32>> {
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(SOCK_DIAG))?;
    set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
    sendto(&socket, &request(), SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    let (mut ports, mut buffer) = (BTreeSet::new(), vec![0; MESSAGE]);
    loop {
        let (length, _) = recv(&socket, &mut buffer[..], RecvFlags::empty())?;
        if understand(buffer.get(..length).unwrap_or_default(), &mut ports)? {
            return Ok(ports);
        }
    }
}

/// `struct nlmsghdr`, then `struct vsock_diag_req`: all vsock sockets that listen.
fn request() -> Vec<u8> {
    let family = u8::try_from(AddressFamily::VSOCK.as_raw()).unwrap_or(40);
    let mut request = vec![family, 0, 0, 0];
    for word in [1_u32 << LISTEN, 0, 0, 0, 0] {
        request.extend(word.to_ne_bytes());
    }
    let length = u32::try_from(HEADER + request.len()).unwrap_or(0);
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    message.extend(REQUEST_DUMP.to_ne_bytes());
    // Sequence number and sender: nobody else uses this socket.
    message.extend([0; 8]);
    message.append(&mut request);
    message
}

/// Reads what came in one piece; `true`: that was all.
fn understand(mut messages: &[u8], ports: &mut BTreeSet<u32>) -> io::Result<bool> {
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer about vsock is not understood");
    let word = |bytes: &[u8], at: usize| -> io::Result<u32> {
        let word = bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
        Ok(u32::from_ne_bytes(word.ok_or_else(malformed)?))
    };
    while !messages.is_empty() {
        let length = usize::try_from(word(messages, 0)?).map_err(|_| malformed())?;
        let kind = messages.get(4..6).and_then(|kind| kind.try_into().ok()).map(u16::from_ne_bytes);
        let payload = messages.get(HEADER..length).ok_or_else(malformed)?;
        match kind {
            Some(DONE | ERROR) => {
                // An error number, negative; none is none.
                let code = if payload.len() < 4 { 0 } else { word(payload, 0)?.cast_signed() };
                return if code < 0 { Err(io::Error::from_raw_os_error(code.wrapping_neg())) } else { Ok(true) };
            }
            // `struct vsock_diag_msg`: family, type, state, shutdown; then CID and port of this side.
            Some(SOCK_DIAG_BY_FAMILY) => {
                let state = payload.get(2).ok_or_else(malformed)?;
                let port = word(payload, 8)?;
                if *state == LISTEN {
                    ports.insert(port);
                }
            }
            _ => {}
        }
        messages = messages.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(HEADER + payload.len()).unwrap();
        let mut message = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0; 10], payload].concat();
        message.resize(message.len().next_multiple_of(4), 0);
        message
    }

    fn socket(state: u8, port: u32) -> Vec<u8> {
        let words: Vec<u8> = [3_u32, port, 0, 0, 0, 0, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
        message(SOCK_DIAG_BY_FAMILY, &[&[40, 1, state, 0][..], &words].concat())
    }

    #[test]
    fn ports_that_are_listened_on_are_told_until_the_kernel_says_that_it_is_done() {
        let mut ports = BTreeSet::new();
        let piece = [socket(LISTEN, 9000), socket(1, 77), socket(LISTEN, 8000)].concat();
        assert!(!understand(&piece, &mut ports).unwrap());
        assert!(understand(&message(DONE, &0_i32.to_ne_bytes()), &mut ports).unwrap());
        assert_eq!(ports, BTreeSet::from([8000, 9000]));
    }

    #[test]
    fn a_kernel_that_cannot_tell_says_so() {
        let refused = message(ERROR, &(-2_i32).to_ne_bytes());
        assert_eq!(understand(&refused, &mut BTreeSet::new()).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(understand(&socket(LISTEN, 9000)[..20], &mut BTreeSet::new()).is_err());
    }

    #[test]
    fn whatever_comes_is_an_answer_or_an_error() {
        let whole = [socket(LISTEN, 9000), message(DONE, &[])].concat();
        for at in 0..whole.len() {
            let _answer = understand(&whole[..at], &mut BTreeSet::new());
            for byte in 0..=u8::MAX {
                let mut other = whole.clone();
                other[at] = byte;
                let _answer = understand(&other, &mut BTreeSet::new());
            }
        }
    }
}
