//! The background process that owns an enclave: launches it, answers for it on the control socket, ends with it.

use super::Environment;
use super::accounts::{self, CpuChoice, Reservation, Wish};
use super::arguments::RunArguments;
use super::broadcast::{pretty, socket_path};
use super::failure::{Code, Failure, log};
use super::faults::Fault;
use super::image::{Image, Measured, check_signature, measure};
use super::output::{Describe, Identity, Run, Terminate};
use super::wire::{self, Command, MAX_LINE, Reply};
use crate::application::Application;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use rustix::io::Errno;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::{Child, ChildStdin};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

/// The hidden argument of the process between a command and its background process, which makes the latter an orphan.
pub(super) const DETACH: &str = "__detach";
/// The hidden argument of the background process.
pub(super) const PROCESS: &str = "__enclave-process";

/// What an enclave sends when it has booted.
const HEARTBEAT: u8 = 0xB7;
/// The wait for it, as long as the real one's shortest.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// The image may fill at most this fraction of the memory.
const MEMORY_PER_IMAGE: u64 = 4;
const MIB: u64 = 1024 * 1024;
const EINVAL: i32 = 22;

/// Starts a background process and gives the connection to it.
///
/// # Errors
/// E05.
pub(super) fn spawn(environment: &Environment) -> Result<StdUnixStream, Failure> {
    let start = || -> io::Result<StdUnixStream> {
        let (ours, theirs) = StdUnixStream::pair()?;
        std::process::Command::new(std::env::current_exe()?)
            .arg(DETACH)
            .envs(environment.variables())
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        Ok(ours)
    };
    start().map_err(|error| Failure::new(Code::SPAWN, error.to_string()))
}

/// The process in between: starts the background process and ends, so that nobody waits for that one.
pub(super) fn detach(environment: &Environment) -> ExitCode {
    let started = std::env::current_exe()
        .and_then(|program| std::process::Command::new(program).arg(PROCESS).envs(environment.variables()).spawn());
    if started.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The file that holds an enclave's console.
pub(super) fn console_path(state: &Path, slot: &str) -> PathBuf {
    state.join("console").join(slot)
}

/// The whole background process.
pub(super) fn main(environment: &Environment) -> ExitCode {
    let serve = || -> io::Result<u8> {
        let stream = StdUnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
        rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
        rustix::process::setsid()?;
        stream.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let code = runtime.block_on(async { process(environment, UnixStream::from_std(stream)?).await })?;
        // An image may still be being hashed.
        runtime.shutdown_background();
        Ok(code)
    };
    match serve() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            // Nobody is left to hear that the log can't be written either.
            let _ignored = log(environment, "enc", &format!("Enclave process failed: {error}"));
            ExitCode::from(Code::SOCKET.0)
        }
    }
}

/// One connection: commands come in, replies go out.
struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    fn new(stream: UnixStream) -> Self {
        Self { stream: BufReader::new(stream) }
    }

    /// One copy of a command; none where it is not one.
    async fn command(&mut self) -> Option<Command> {
        let mut line = Vec::new();
        (&mut self.stream).take(MAX_LINE).read_until(b'\n', &mut line).await.ok()?;
        serde_json::from_slice(&line).ok()
    }

    async fn reply(&mut self, reply: Reply) -> io::Result<()> {
        self.stream.get_mut().write_all(&wire::line(&reply)).await
    }
}

/// The caller has gone while it was being answered: this ends the real one, and its enclave.
fn caller_gone(error: &io::Error) -> Failure {
    Failure::new(Code::SOCKET, format!("Failed to write to stream: {error}"))
}

/// The signals that end a background process cleanly.
struct Signals([Signal; 4]);

impl Signals {
    fn new() -> io::Result<Self> {
        let listen = |kind| signal(kind);
        Ok(Self([
            listen(SignalKind::terminate())?,
            listen(SignalKind::interrupt())?,
            listen(SignalKind::quit())?,
            listen(SignalKind::hangup())?,
        ]))
    }

    async fn any(&mut self) {
        let [a, b, c, d] = &mut self.0;
        // Cancel-safe: Signal::recv keeps what it has not handed out.
        tokio::select! { _ = a.recv() => {}, _ = b.recv() => {}, _ = c.recv() => {}, _ = d.recv() => {} }
    }
}

/// A running enclave and all that it holds.
struct Enclave {
    run: Run,
    slot: String,
    debug: bool,
    // None once it has been given back.
    reservation: Option<Reservation>,
    child: Child,
    // The enclave ends when this is closed.
    _life: ChildStdin,
    measuring: Option<JoinHandle<io::Result<Measured>>>,
    measured: Option<Measured>,
    identity: Identity,
    dies_after: Option<Duration>,
}

async fn process(environment: &Environment, stream: UnixStream) -> io::Result<u8> {
    let mut signals = Signals::new()?;
    let mut caller = Client::new(stream);
    let Some(Command::Run { .. }) = caller.command().await else { return Ok(0) };
    let Some(Command::Run { arguments, fault }) = caller.command().await else { return Ok(0) };
    let mut enclave = match launch(environment, &arguments, fault.as_ref(), &mut caller).await {
        Ok(enclave) => enclave,
        Err(failure) => {
            let block = failure.during("Failed to execute command `Run`").block(environment);
            // The caller may be gone; nothing runs that would have to be ended.
            let _ignored = caller.reply(Reply::Stderr(block)).await;
            let _ignored = caller.reply(Reply::Status(EINVAL)).await;
            return Ok(0);
        }
    };
    let path = socket_path(environment, &enclave.run.id);
    let code = serve(environment, &path, &mut enclave, &mut signals, caller).await;
    let _ignored = fs::remove_file(&path);
    end(environment, &mut enclave).await;
    code
}

/// Ends the enclave and gives back what it held, if that has not been done.
async fn end(environment: &Environment, enclave: &mut Enclave) {
    let _ignored = enclave.child.kill().await;
    if let Some(reservation) = enclave.reservation.take() {
        if let Some(folder) = &environment.vsock {
            let _ignored = fs::remove_file(folder.join(format!("{}.sock", reservation.holding.cid)));
        }
        reservation.give_back(environment);
        let _ignored = log(environment, &format!("enc-{}", enclave.slot), "Enclave terminated.");
    }
}

/// Answers on the control socket until the enclave or the process ends; gives the exit code.
async fn serve(
    environment: &Environment,
    path: &Path,
    enclave: &mut Enclave,
    signals: &mut Signals,
    mut caller: Client,
) -> io::Result<u8> {
    let listener = UnixListener::bind(path)?;
    // As the real one does, whatever the umask.
    fs::set_permissions(path, fs::Permissions::from_mode(0o766))?;
    let mut deleted = deletion(path)?;
    let (sender, mut clients) = mpsc::channel(16);
    let mut tasks = JoinSet::new();
    tasks.spawn(listen(listener, sender));
    if caller.reply(Reply::Status(0)).await.is_err() {
        return Ok(Code::SOCKET.0);
    }
    drop(caller);
    let dies_after = enclave.dies_after;
    let death = async {
        match dies_after {
            Some(after) => tokio::time::sleep(after).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(death);
    loop {
        tokio::select! {
            // Cancel-safe: what is not received stays in the channel.
            client = clients.recv() => match client {
                Some(client) => match answer(environment, enclave, client).await {
                    Ok(true) => {}
                    Ok(false) => return Ok(0),
                    Err(failure) => return Ok(failure.code.0),
                },
                None => return Ok(Code::SOCKET.0),
            },
            // Cancel-safe, see there.
            () = signals.any() => return Ok(0),
            // Cancel-safe as documented: a later wait gives the same status.
            _ = enclave.child.wait() => return Ok(0),
            // Cancel-safe: the thread goes on, and its handle is asked again.
            _ = &mut deleted => return Ok(1),
            // Pinned outside: goes on where it was.
            () = &mut death => return Ok(0),
        }
    }
}

/// Takes connections one after the other: one that says nothing keeps all others waiting, as with the real one.
async fn listen(listener: UnixListener, clients: mpsc::Sender<Client>) {
    while let Ok((stream, _)) = listener.accept().await {
        let mut client = Client::new(stream);
        if client.command().await.is_some() && clients.send(client).await.is_err() {
            return;
        }
    }
}

/// Waits, on a thread of its own, until the control socket is deleted.
fn deletion(path: &Path) -> io::Result<JoinHandle<()>> {
    let events = inotify::init(inotify::CreateFlags::CLOEXEC)?;
    inotify::add_watch(&events, path, inotify::WatchFlags::ATTRIB | inotify::WatchFlags::DELETE_SELF)?;
    let path = path.to_owned();
    Ok(tokio::task::spawn_blocking(move || {
        let mut buffer = [0; 4096];
        // What the events say is of no interest: the path is looked at again. And not only when one comes, for it comes a
        // moment before the name is gone.
        let pause = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
        while path.exists() {
            match poll(&mut [PollFd::new(&events, PollFlags::IN)], Some(&pause)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) if rustix::io::read(&events, &mut buffer).is_ok() => {}
                Ok(_) | Err(_) => return,
            }
        }
    }))
}

/// Answers one command; false when the process is to end. A command whose second copy is missing ends it, too.
async fn answer(environment: &Environment, enclave: &mut Enclave, mut client: Client) -> Result<bool, Failure> {
    let Some(command) = client.command().await else { return Ok(false) };
    let mut goes_on = true;
    let replies = match command {
        Command::Run { .. } => vec![Reply::Status(17)],
        Command::Cid => vec![Reply::Value(u64::from(enclave.run.cid))],
        Command::IsDebug => vec![Reply::Value(u64::from(enclave.debug))],
        Command::Name => vec![Reply::Confirm, Reply::Stdout(pretty(&enclave.run.name)), Reply::Status(0)],
        Command::IdByName(name) if name == enclave.run.name => {
            vec![Reply::Confirm, Reply::Stdout(pretty(&enclave.run.id)), Reply::Status(0)]
        }
        Command::IdByName(_) => vec![Reply::Confirm, Reply::Status(0)],
        Command::Describe { metadata } => {
            client.reply(Reply::Confirm).await.map_err(|error| caller_gone(&error))?;
            let description = describe(enclave, metadata).await?;
            vec![Reply::Stdout(pretty(&description)), Reply::Status(0)]
        }
        Command::Terminate => {
            goes_on = false;
            end(environment, enclave).await;
            let done = Terminate { name: enclave.run.name.clone(), id: enclave.run.id.clone(), terminated: true };
            let _ignored = fs::remove_file(socket_path(environment, &enclave.run.id));
            vec![
                Reply::Stderr(format!("Successfully terminated enclave {}.", enclave.run.id)),
                Reply::Stdout(pretty(&done)),
                Reply::Status(0),
            ]
        }
    };
    for reply in replies {
        client.reply(reply).await.map_err(|error| caller_gone(&error))?;
    }
    Ok(goes_on)
}

/// Describes the enclave; the first time, once the image has been hashed.
async fn describe(enclave: &mut Enclave, metadata: bool) -> Result<Describe, Failure> {
    if let Some(measuring) = enclave.measuring.take() {
        let measured = measuring.await.map_err(|error| Failure::new(Code(16), error.to_string()))?;
        enclave.measured = Some(measured.map_err(|error| Failure::new(Code::EIF, error.to_string()))?);
    }
    Ok(Describe {
        run: enclave.run.clone(),
        state: "RUNNING".to_owned(),
        flags: if enclave.debug { "DEBUG_MODE" } else { "NONE" }.to_owned(),
        measurements: enclave.measured.clone().map(|measured| measured.registers).unwrap_or_default(),
        identity: if metadata { enclave.identity.clone() } else { Identity::default() },
    })
}

/// Launches the enclave, in the real one's order, which decides the error that is reported where several would do.
async fn launch(
    environment: &Environment,
    arguments: &RunArguments,
    fault: Option<&Fault>,
    caller: &mut Client,
) -> Result<Enclave, Failure> {
    let path = Path::new(&arguments.eif_path);
    let open = |error: io::Error| Failure::file(path, "Open", &error);
    let mut file = File::open(path).map_err(open)?;
    let pool = accounts::pool(environment)?;
    let cpus = match (&arguments.cpu_ids, arguments.cpu_count) {
        (Some(list), _) => CpuChoice::List(list.clone()),
        (None, Some(count)) => CpuChoice::Count(usize::try_from(count).unwrap_or(usize::MAX)),
        (None, None) => return Err(Failure::new(Code::INVALID_ARGUMENT, "Invalid CPU configuration argument")),
    };
    accounts::check_cpus(&pool, &cpus)?;
    let image_len = file.metadata().map_err(open)?.len();
    if image_len.saturating_mul(MEMORY_PER_IMAGE) > arguments.memory_mib.saturating_mul(MIB) {
        let least = image_len.div_ceil(MIB) * MEMORY_PER_IMAGE;
        return Err(Failure::new(Code::MEMORY_TOO_SMALL, format!("At least {least} MB must be allocated")).about([
            "memory".to_owned(),
            arguments.memory_mib.to_string(),
            least.to_string(),
        ]));
    }
    accounts::check_device(environment, &pool)?;
    let image = Image::read(&mut file)
        .map_err(|error| Failure::new(Code::SIGNATURE, format!("Failed to read EIF: {error}")))?;
    if image.is_signed {
        check_signature(path)
            .map_err(|error| Failure::new(Code::SIGNATURE, format!("Invalid signing certificate: {error}")))?;
    }
    let hashing = match fault {
        Some(Fault::SlowFirstDescribe { millis }) => Duration::from_millis(*millis),
        _ => Duration::ZERO,
    };
    let to_measure = path.to_owned();
    let measuring = tokio::task::spawn_blocking(move || {
        std::thread::sleep(hashing);
        measure(&to_measure)
    });

    caller.reply(Reply::Stderr("Start allocating memory...".to_owned())).await.map_err(|error| caller_gone(&error))?;
    if let Some(Fault::FailInside { code }) = fault {
        return Err(Failure::new(*code, "hazard"));
    }
    let slot = new_slot();
    let wish = Wish { cpus, memory_mib: arguments.memory_mib, cid: arguments.enclave_cid };
    let reservation = accounts::reserve(environment, &slot, &wish)?;
    let application = image.last_ramdisk(&mut file);
    match start(environment, arguments, &slot, &reservation, application, fault, caller).await {
        Ok((run, child, life)) => Ok(Enclave {
            run,
            slot,
            debug: arguments.debug_mode,
            reservation: Some(reservation),
            child,
            _life: life,
            measuring: Some(measuring),
            measured: None,
            identity: Identity::of(&image),
            dies_after: match fault {
                Some(Fault::DieAfter { millis }) => Some(Duration::from_millis(*millis)),
                _ => None,
            },
        }),
        Err(failure) => {
            reservation.give_back(environment);
            Err(failure)
        }
    }
}

/// Starts the enclave that a reservation was made for, waits until it has booted, and tells the caller of it.
async fn start(
    environment: &Environment,
    arguments: &RunArguments,
    slot: &str,
    reservation: &Reservation,
    application: io::Result<Vec<u8>>,
    fault: Option<&Fault>,
    caller: &mut Client,
) -> Result<(Run, Child, ChildStdin), Failure> {
    // There is one heartbeat port, and it is taken until the enclave has booted.
    let _heartbeat_port = heartbeat_port(environment)?;
    let holding = &reservation.holding;
    let name = arguments.enclave_name.clone().unwrap_or_default();
    let started = format!(
        "Started enclave with enclave-cid: {}, memory: {} MiB, cpu-ids: {:?}",
        holding.cid,
        holding.memory_mib(),
        holding.cpu_ids
    );
    caller.reply(Reply::Stderr(started)).await.map_err(|error| caller_gone(&error))?;
    let never =
        |error: io::Error| Failure::new(Code::BOOT, format!("Waiting on enclave to boot failed with error {error}"));
    match fault {
        Some(Fault::NeverBoots { millis }) => {
            tokio::time::sleep(Duration::from_millis(*millis)).await;
            return Err(never(io::ErrorKind::TimedOut.into()));
        }
        Some(Fault::SlowBoot { millis }) => tokio::time::sleep(Duration::from_millis(*millis)).await,
        _ => {}
    }
    let (child, life) = boot(environment, arguments, slot, holding.cid, &name, application).await.map_err(never)?;
    let run = Run {
        name,
        id: format!("{}-enc{slot}", instance_id(environment)),
        process_id: std::process::id(),
        cid: holding.cid,
        cpu_count: holding.cpu_ids.len(),
        cpu_ids: holding.cpu_ids.clone(),
        memory_mib: holding.memory_mib(),
    };
    caller.reply(Reply::Stdout(pretty(&run))).await.map_err(|error| caller_gone(&error))?;
    Ok((run, child, life))
}

fn heartbeat_port(environment: &Environment) -> Result<File, Failure> {
    let bind = || -> io::Result<File> {
        let state = environment.state.as_ref().ok_or(io::ErrorKind::NotFound)?;
        let file = OpenOptions::new().create(true).append(true).open(state.join("heartbeat-9000.lock"))?;
        file.try_lock()?;
        Ok(file)
    };
    bind().map_err(|error| {
        Failure::new(Code::BOOT, format!("Enclave boot heartbeat vsock connection - vsock bind error: {error}"))
    })
}

/// Runs the inside of the enclave and waits for its heartbeat.
async fn boot(
    environment: &Environment,
    arguments: &RunArguments,
    slot: &str,
    cid: u32,
    name: &str,
    application: io::Result<Vec<u8>>,
) -> io::Result<(Child, ChildStdin)> {
    let application = Application::from_ramdisk(&application?)?;
    let (Some(vsock), Some(state)) = (&environment.vsock, &environment.state) else {
        return Err(io::ErrorKind::NotFound.into());
    };
    let program = match &environment.enclave_binary {
        Some(program) => program.clone(),
        None => std::env::current_exe()?.with_file_name("standin-enclave"),
    };
    let console: Stdio = if arguments.debug_mode {
        let path = console_path(state, slot);
        fs::create_dir_all(path.parent().unwrap_or(state))?;
        File::create(path)?.into()
    } else {
        Stdio::null()
    };
    let mut child = tokio::process::Command::new(program)
        .arg("--dir")
        .arg(vsock)
        .args(["--cid", &cid.to_string(), "--name", name])
        .env_clear()
        .envs(environment.variables())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(console)
        .kill_on_drop(true)
        .spawn()?;
    let (Some(mut life), Some(mut heart)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(io::ErrorKind::BrokenPipe.into());
    };
    life.write_all(&application.to_line()).await?;
    let beat = tokio::time::timeout(BOOT_LIMIT, heart.read_u8()).await.map_err(|_| io::ErrorKind::TimedOut)??;
    if beat != HEARTBEAT {
        return Err(io::Error::other(format!("heartbeat of {beat:#x}")));
    }
    Ok((child, life))
}

/// The identity of an enclave on its host: hexadecimal, as the hypervisor's are.
fn new_slot() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // Time in microseconds, 52 bits until 2112; the process tells apart what begins in the same one.
    format!("{:x}{:03x}", since.as_micros(), std::process::id() & 0xfff)
}

/// The instance's ID, where the host has one.
fn instance_id(environment: &Environment) -> String {
    fs::read_to_string(environment.sysfs.join("devices/virtual/dmi/id/board_asset_tag"))
        .map(|text| text.split_whitespace().collect())
        .unwrap_or_else(|_| "i-0000000000000000".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_is_its_own_and_hexadecimal() {
        let slot = new_slot();
        assert!(u64::from_str_radix(&slot, 16).is_ok(), "{slot}");
    }

    #[test]
    fn an_instance_without_a_tag_has_the_real_ones_fallback_id() {
        let folder = tempfile::tempdir().unwrap();
        let environment = Environment { sysfs: folder.path().to_owned(), ..Environment::of_this_process() };
        assert_eq!(instance_id(&environment), "i-0000000000000000");
        let tag = folder.path().join("devices/virtual/dmi/id");
        fs::create_dir_all(&tag).unwrap();
        fs::write(tag.join("board_asset_tag"), "i-0123456789abcdef0\n").unwrap();
        assert_eq!(instance_id(&environment), "i-0123456789abcdef0");
    }
}
