//! The list of an enclave's endpoints, for the enclave itself: whoever connects gets the document and the end.

use crate::counters::{Failure, Open, Traffic};
use crate::seats::Seats;
use crate::shared::Shared;
use crate::vsock::Stream;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Readers at a time; more are hung up on.
const READERS: u64 = 64;

/// How long a reader may take.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(crate) struct Hosts {
    document: String,
    /// Ends with the enclave.
    pub(crate) cut: CancellationToken,
    traffic: Arc<Traffic>,
    /// Of this enclave's CID alone, while `traffic` is that of all generations.
    pub(crate) seats: Seats,
}

impl Hosts {
    /// `seats` are those of the list that it takes the place of, or new.
    pub(crate) fn new(document: String, cut: CancellationToken, traffic: Arc<Traffic>, seats: Seats) -> Self {
        Self { document, cut, traffic, seats }
    }

    pub(crate) fn serve(self: Arc<Self>, mut enclave: Stream, shared: &Shared) {
        let open = Open::egress(&self.traffic);
        let Some(seat) = self.seats.take(READERS) else { return self.traffic.fail(Failure::Limit) };
        shared.spawn(async move {
            let cut = self.cut.child_token();
            let given = tokio::select! {
                // Cancel-safe: a token stays cancelled.
                () = cut.cancelled() => Err(Failure::Cut),
                // Not finished is what it must be when the enclave is gone.
                given = timeout(PATIENCE, give(&mut enclave, self.document.as_bytes())) => match given {
                    Ok(Ok(())) => Ok(()),
                    Ok(Err(_)) => Err(Failure::Reset),
                    Err(_) => Err(Failure::Idle),
                },
            };
            match given {
                Ok(()) => drop(self.traffic.to_enclave.fetch_add(self.document.len() as u64, Relaxed)),
                Err(failure) => self.traffic.fail(failure),
            }
            drop((seat, open));
        });
    }
}

async fn give(enclave: &mut Stream, document: &[u8]) -> io::Result<()> {
    enclave.write_all(document).await?;
    enclave.shutdown().await
}
