//! The application behind every contender: answers `/N` with N bytes, whatever the body. It serves until the program ends, and is
//! not measured.

use bytes::Bytes;
use enclaved_core::id::Cid;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

#[derive(Debug)]
pub(super) struct Application {
    /// The folder of the hybrid vsock; the enclave is [`Cid::FIRST`].
    pub(super) vsock: PathBuf,
    /// The same over a plain Unix socket.
    pub(super) unix: PathBuf,
}

impl Application {
    pub(super) fn start(folder: &Path) -> anyhow::Result<Self> {
        let (vsock, unix) = (folder.join("vsock"), folder.join("application"));
        std::fs::create_dir(&vsock)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (enclave, plain) = runtime.block_on(async {
            let enclave = UnixListener::bind(vsock.join(format!("{}.sock", Cid::FIRST)))?;
            Ok::<_, anyhow::Error>((enclave, UnixListener::bind(&unix)?))
        })?;
        std::thread::spawn(move || runtime.block_on(serve(enclave, plain)));
        Ok(Self { vsock, unix })
    }
}

async fn serve(enclave: UnixListener, plain: UnixListener) {
    loop {
        tokio::select! {
            // Cancel-safe, as tokio says of all accepts.
            accepted = enclave.accept() => if let Ok((mut stream, _)) = accepted {
                tokio::spawn(async move {
                    // `CONNECT 8080\n`, which comes in one piece from whoever is measured here.
                    let mut line = [0; 64];
                    if stream.read(&mut line).await.is_ok() && stream.write_all(b"OK 1\n").await.is_ok() {
                        answer(stream).await;
                    }
                });
            },
            accepted = plain.accept() => if let Ok((stream, _)) = accepted {
                tokio::spawn(answer(stream));
            },
        }
    }
}

async fn answer(stream: UnixStream) {
    let service = hyper::service::service_fn(|mut request: Request<Incoming>| async move {
        while let Some(Ok(_)) = request.body_mut().frame().await {}
        let length = request.uri().path().trim_start_matches('/').parse().unwrap_or(2);
        Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(vec![b'x'; length]))))
    });
    // However it ends: the load notices what it does not get.
    drop(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
}
