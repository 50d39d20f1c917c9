//! The simulated machine as a whole.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use enclaved_integration::host::{ECHO_PORT, EGRESS_PORT, HTTP_PORT, Machine, Options};
use enclaved_integration::processes::carrying;
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::TokioIo;
use rustix::process::Signal;
use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::time::Duration;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::task::JoinSet;

async fn machine() -> Machine {
    Machine::start(Options::default()).await.unwrap()
}

/// A launch by hand, as the daemon would do it.
fn launch(machine: &Machine, eif: &Path, cid: u32) {
    let mut command = machine.nitro.command();
    command.args(["run-enclave", "--cpu-count", "2", "--memory", "64", "--enclave-name", "signer-1"]);
    let output = command.arg("--eif-path").arg(eif).args(["--enclave-cid", &cid.to_string()]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// What an egress proxy does, in a line.
fn forward(machine: &Machine, cid: u32, tasks: &mut JoinSet<()>) {
    let listener = UnixListener::bind(machine.nitro.vsock().join(format!("{cid}.sock_{EGRESS_PORT}"))).unwrap();
    let upstream = machine.upstream.address();
    tasks.spawn(async move {
        while let Ok((mut inner, _)) = listener.accept().await {
            let mut outer = TcpStream::connect(upstream).await.unwrap();
            copy_bidirectional(&mut inner, &mut outer).await.unwrap();
        }
    });
}

async fn get(machine: &Machine, cid: u32, path: &str) -> (u16, Vec<u8>) {
    let stream = machine.nitro.connect(cid, HTTP_PORT).unwrap();
    stream.set_nonblocking(true).unwrap();
    let stream = TokioIo::new(UnixStream::from_std(stream).unwrap());
    let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await.unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(connection);
    let request = hyper::Request::get(path).header("host", "signer").body(Empty::<bytes::Bytes>::new()).unwrap();
    let answer = sender.send_request(request).await.unwrap();
    (answer.status().as_u16(), answer.into_body().collect().await.unwrap().to_bytes().to_vec())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_from_the_bucket_runs_and_calls_out_to_the_upstream() {
    let machine = machine().await;
    let measured = machine.put_image("signer.eif", &machine.sample_application("v1")).await.unwrap();
    assert!(measured.crc_is_right);
    let object = machine.s3.owner().get_object().bucket(machine.bucket()).key("signer.eif").send().await.unwrap();
    let eif = machine.path().join("signer.eif");
    std::fs::write(&eif, object.body.collect().await.unwrap().into_bytes()).unwrap();
    let mut tasks = JoinSet::new();
    forward(&machine, 16, &mut tasks);
    launch(&machine, &eif, 16);

    let (status, body) = get(&machine, 16, "/pay?x=1").await;
    let answer: enclaved_integration::enclave::Answer = serde_json::from_slice(&body).unwrap();
    assert_eq!((status, answer.label.as_str(), answer.enclave.as_str(), answer.cid), (200, "v1", "signer-1", 16));
    let upstream = serde_json::to_value(&answer.upstream).unwrap();
    assert_eq!(upstream["answered"]["body"], "hello from upstream\n");
    let visits = machine.upstream.visits();
    assert_eq!((visits[0].path.as_str(), visits[0].host.as_deref()), ("/pay?x=1", Some("upstream.test")));

    assert_eq!(get(&machine, 16, "/health").await.0, 200);
    assert_eq!(get(&machine, 16, "/stream?bytes=200000").await.1.len(), 200_000);
    assert_eq!(get(&machine, 16, "/slow?ms=1").await.0, 200);
    assert_eq!(get(&machine, 16, "/via/8001/secret").await.0, 502, "nobody listens for it");
    assert!(machine.nitro.connect(16, ECHO_PORT).is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_enclave_still_runs_and_says_nothing() {
    let machine = machine().await;
    let application = machine.sample_application("v1");
    let eif = machine.path().join("frozen.eif");
    std::fs::write(&eif, enclaved_integration::nitro_host::image(&application)).unwrap();
    launch(&machine, &eif, 16);
    let stream = machine.nitro.connect(16, HTTP_PORT).unwrap();
    (&stream).write_all(b"POST /freeze HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n").unwrap();
    assert!((&stream).read(&mut [0; 1]).unwrap() > 0);
    let silent = UnixStream::connect(machine.nitro.vsock().join("16.sock")).await.unwrap();
    silent.writable().await.unwrap();
    silent.try_write(b"CONNECT 8080\n").unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(100), silent.readable()).await.is_err());
    let described = machine.nitro.command().arg("describe-enclaves").output().unwrap();
    assert!(String::from_utf8_lossy(&described.stdout).contains("\"State\": \"RUNNING\""));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_enclave_that_is_not_ready_says_so_and_then_is() {
    let machine = machine().await;
    let application =
        enclaved_integration::application::Application { ready_millis: 300, ..machine.sample_application("v1") };
    let eif = machine.path().join("slow.eif");
    std::fs::write(&eif, enclaved_integration::nitro_host::image(&application)).unwrap();
    launch(&machine, &eif, 16);
    assert_eq!(get(&machine, 16, "/health").await.0, 503);
    let ready = async {
        while get(&machine, 16, "/health").await.0 != 200 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), ready).await.unwrap();
}

#[tokio::test]
async fn programs_get_the_machines_environment_and_nothing_else() {
    let machine = machine().await;
    let output = machine.command_at(Path::new("/usr/bin/env")).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let names: BTreeSet<&str> = text.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name).collect();
    let expected: BTreeSet<&str> = machine.variables().iter().map(|(name, _)| *name).collect();
    assert_eq!(names, expected);
}

#[tokio::test]
async fn the_daemon_accepts_the_configuration_which_names_this_machine() {
    let machine = machine().await;
    machine.write_config(&(machine.host_config() + &machine.sample_enclave("signer", "signer.eif"))).unwrap();
    enclaved::config::load(&machine.config_file()).unwrap();
    let config: toml::Table = std::fs::read_to_string(machine.config_file()).unwrap().parse().unwrap();
    assert_eq!(config["vsock"]["transport"]["hybrid"].as_str(), machine.nitro.vsock().to_str());
    assert_eq!(config["enclave"][0]["image"].as_str(), Some("s3://caution-d-0001-images/signer.eif"));
    assert!(machine.run_dir().as_os_str().len() <= 80, "sockets are opened in it");
}

#[tokio::test]
async fn two_machines_do_not_share_an_address() {
    let (one, other) = tokio::join!(machine(), machine());
    assert_ne!(one.ingress(), other.ingress());
    assert!(std::net::TcpListener::bind(one.ingress()).is_ok() && std::net::TcpListener::bind(one.tcp(9000)).is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_a_machine_ends_its_programs_and_what_they_started_and_removes_its_files() {
    let machine = machine().await;
    let folder = machine.path().to_owned();
    let mut shell = machine.command_at(Path::new("/bin/sh"));
    // One that outlives its parent, in a session of its own.
    shell.args(["-c", "setsid sleep 600 & echo started; exec sleep 600"]);
    let pid = machine.start_program(shell).unwrap();
    let started = async {
        while !machine.log().contains("started") || carrying(&folder).len() < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), started).await.unwrap();
    machine.signal(pid, Signal::TERM).unwrap();
    let status = machine.wait_for_end(pid, Duration::from_secs(20)).unwrap().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(15));
    assert_eq!(carrying(&folder).len(), 1);
    drop(machine);
    assert_eq!(carrying(&folder), [] as [i32; 0]);
    assert!(!folder.exists());
}
