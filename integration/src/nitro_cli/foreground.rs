//! The commands as their caller sees them: arguments in, JSON and blocks out, an exit code.

use super::Environment;
use super::arguments::{self, RunArguments};
use super::background;
use super::broadcast::{Form, connect, gather, pretty, send_to_all, socket_path};
use super::calls;
use super::failure::{Code, Failure, log};
use super::faults::{self, Fault};
use super::image::{Image, measure};
use super::output::{Describe, DescribeEif, Identity, Run, Terminate};
use super::wire::{Command, Connection};
use clap::ArgMatches;
use rustix::process::{Signal, getpid, kill_process};
use std::fs::{self, File};
use std::io::{Read, Write as _};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// The errno that a background process reports where the caller may not do what it asks; nothing for `--all` to fail on.
const EACCES: i32 = 13;
/// What a hazard prints in place of JSON.
const GARBAGE: &str = "{\"EnclaveName\": \"\u{0}\u{fffd}, Segmentation fa\n";
/// How often a console looks for more.
const CONSOLE_POLL: Duration = Duration::from_millis(50);

/// A command's standard output, and how it went.
type Outcome = (String, Result<(), Failure>);

fn nothing_but(failure: Failure) -> Outcome {
    (String::new(), Err(failure))
}

/// Runs the command line of this process.
pub(super) fn main(environment: &Environment) -> ExitCode {
    calls::record(environment);
    let matches = arguments::command().try_get_matches();
    let command = std::env::args().nth(1).unwrap_or_default();
    let command = command.trim_start_matches('-');
    let fault = match hazard(environment, command, matches.as_ref().ok()) {
        Ok(fault) => fault,
        Err(error) => {
            eprintln!(
                "stand-in nitro-cli: {}: {error}",
                environment.faults.as_deref().unwrap_or(Path::new("")).display()
            );
            return ExitCode::from(70);
        }
    };
    match &fault {
        Some(Fault::Hang { millis }) => std::thread::sleep(Duration::from_millis(*millis)),
        Some(Fault::Garbage) => {
            print!("{GARBAGE}");
            return ExitCode::SUCCESS;
        }
        Some(Fault::Silence) => return ExitCode::SUCCESS,
        Some(Fault::Fail { code }) => return fail(environment, &Failure::new(*code, "hazard")),
        _ => {}
    }
    let matches = match matches {
        Ok(matches) => matches,
        Err(usage) => usage.exit(),
    };
    if let Err(failure) = log(environment, "nitro-cli", "Start Nitro CLI") {
        return fail(environment, &failure);
    }
    let (stdout, result) = execute(environment, &matches, fault.as_ref());
    finish(environment, fault.as_ref(), &stdout, result)
}

fn hazard(environment: &Environment, command: &str, matches: Option<&ArgMatches>) -> std::io::Result<Option<Fault>> {
    let name = matches
        .and_then(|matches| matches.subcommand_matches("run-enclave"))
        .and_then(|matches| RunArguments::from(matches).ok())
        .map(|arguments| arguments.unique_name(&[]));
    faults::next(environment, command, name.as_deref())
}

fn execute(environment: &Environment, matches: &ArgMatches, fault: Option<&Fault>) -> Outcome {
    let connections_fail = fault == Some(&Fault::ConnectionsFail);
    match matches.subcommand() {
        Some(("run-enclave", matches)) => run(environment, matches, fault),
        Some(("terminate-enclave", matches)) if matches.get_flag("all") => terminate_all(environment, connections_fail),
        Some(("terminate-enclave", matches)) => terminate(environment, matches, connections_fail),
        Some(("describe-enclaves", matches)) => describe(environment, matches.get_flag("metadata"), connections_fail),
        Some(("describe-eif", matches)) => {
            let path = arguments::text(matches, "eif-path").unwrap_or_default();
            match describe_eif(Path::new(&path)) {
                Ok(printed) => (printed, Ok(())),
                Err(error) => nothing_but(Failure::new(Code::EIF, format!("{path}: {error}"))),
            }
        }
        Some(("console", matches)) => (String::new(), console(environment, matches)),
        Some((other, _)) => {
            nothing_but(Failure::new(Code(0), format!("{other} is not simulated by this stand-in of nitro-cli")))
        }
        None => (String::new(), Ok(())),
    }
}

/// Prints, and exits as the result or a hazard has it.
fn finish(environment: &Environment, fault: Option<&Fault>, stdout: &str, result: Result<(), Failure>) -> ExitCode {
    let die = || {
        let _ignored = std::io::stdout().flush();
        // SIGKILL is not survived; the exit code below is never seen.
        let _ignored = kill_process(getpid(), Signal::KILL);
        ExitCode::from(70)
    };
    match fault {
        Some(Fault::KilledBeforeAnswer) => return die(),
        Some(Fault::GarbledAnswer) => {
            print!("{GARBAGE}");
            return ExitCode::SUCCESS;
        }
        _ => print!("{stdout}"),
    }
    match (fault, result) {
        (Some(Fault::KilledAfterAnswer), _) => die(),
        (Some(Fault::SucceedButExit { code }), Ok(())) => ExitCode::from(*code),
        (_, Ok(())) => ExitCode::SUCCESS,
        (_, Err(failure)) => fail(environment, &failure),
    }
}

fn fail(environment: &Environment, failure: &Failure) -> ExitCode {
    eprintln!("{}", failure.block(environment));
    ExitCode::from(failure.code.0)
}

fn run(environment: &Environment, matches: &ArgMatches, fault: Option<&Fault>) -> Outcome {
    let launch = || -> Result<(RunArguments, Connection), Failure> {
        let mut arguments = RunArguments::from(matches)?;
        let stream = background::spawn(environment)?;
        let (connections, _) = send_to_all(environment, &Command::Name, false)?;
        let taken: Vec<String> = connections.into_iter().filter_map(|connection| connection.answer().json()).collect();
        arguments.enclave_name = Some(arguments.unique_name(&taken));
        let command = Command::Run { arguments: arguments.clone(), fault: fault.cloned() };
        Ok((arguments, Connection::send(stream, &command)?))
    };
    let (arguments, connection) = match launch() {
        Ok(launched) => launched,
        Err(failure) => return nothing_but(failure),
    };
    let answer = connection.answer();
    let id = answer.json::<Run>().map(|run| run.id);
    let (printed, result) = gather::<Run>(vec![answer], 0, Form::Single, &[0]);
    match (arguments.attach_console, id, &result) {
        (true, Some(id), Ok(())) => {
            print!("{printed}");
            (String::new(), follow_console(environment, &id, None))
        }
        _ => (printed, result),
    }
}

fn describe(environment: &Environment, metadata: bool, connections_fail: bool) -> Outcome {
    match send_to_all(environment, &Command::Describe { metadata }, connections_fail) {
        Ok((connections, failed)) => {
            let answers = connections.into_iter().map(Connection::answer).collect();
            gather::<Describe>(answers, failed, Form::Array, &[0])
        }
        Err(failure) => nothing_but(failure),
    }
}

/// The ID that a command names, directly or by the enclave's name.
fn enclave_id(environment: &Environment, matches: &ArgMatches) -> Result<String, Failure> {
    let Some(name) = arguments::text(matches, "enclave-name") else {
        return Ok(arguments::text(matches, "enclave-id").unwrap_or_default());
    };
    let (connections, _) = send_to_all(environment, &Command::IdByName(name), false)?;
    let mut ids: Vec<String> = connections.into_iter().filter_map(|connection| connection.answer().json()).collect();
    match (ids.pop(), ids.is_empty()) {
        (Some(id), true) => Ok(id),
        (None, _) => Err(Failure::new(Code::NAME, "No enclave matched the given name.")),
        (Some(_), false) => Err(Failure::new(Code::NAME, "Conflicting enclave names have been found.")),
    }
}

fn no_such_socket(error: &std::io::Error) -> Failure {
    Failure::new(Code::SOCKET, format!("Failed to connect to specific enclave process: {error}"))
}

fn terminate(environment: &Environment, matches: &ArgMatches, connections_fail: bool) -> Outcome {
    let send = || {
        let path = socket_path(environment, &enclave_id(environment, matches)?);
        let stream = connect(&path, connections_fail).map_err(|error| no_such_socket(&error))?;
        Connection::send(stream, &Command::Terminate)
    };
    match send() {
        Ok(connection) => gather::<Terminate>(vec![connection.answer()], 0, Form::Single, &[0]),
        Err(failure) => nothing_but(failure),
    }
}

/// Unlike a describe, this deletes a socket whatever the cause of the failure, and counts it.
fn terminate_all(environment: &Environment, connections_fail: bool) -> Outcome {
    let entries = match fs::read_dir(&environment.sockets) {
        Ok(entries) => entries,
        Err(error) => return nothing_but(Failure::file(&environment.sockets, "Read", &error)),
    };
    let mut failed = 0;
    let mut answers = Vec::new();
    for path in entries.filter_map(Result::ok).map(|entry| entry.path()) {
        let sent = connect(&path, connections_fail)
            .map_err(|error| no_such_socket(&error))
            .and_then(|stream| Connection::send(stream, &Command::Terminate));
        match sent {
            Ok(connection) => answers.push(connection.answer()),
            Err(_) => {
                failed += 1;
                let _ignored = fs::remove_file(path);
            }
        }
    }
    gather::<Terminate>(answers, failed, Form::Array, &[0, EACCES])
}

fn describe_eif(path: &Path) -> std::io::Result<String> {
    let image = Image::read(&mut File::open(path)?)?;
    let measured = measure(path)?;
    Ok(pretty(&DescribeEif {
        version: image.version,
        measurements: measured.registers,
        is_signed: image.is_signed,
        check_crc: measured.crc_is_right,
        // A wrong signature is an error before this is reached.
        signature_check: image.is_signed.then_some(true),
        identity: Identity::of(&image),
    }))
}

fn console(environment: &Environment, matches: &ArgMatches) -> Result<(), Failure> {
    let seconds = arguments::number(matches, "disconnect-timeout")?;
    let id = enclave_id(environment, matches)?;
    follow_console(environment, &id, seconds.map(Duration::from_secs))
}

/// Prints what the enclave writes to its console, until it ends or the time is over.
fn follow_console(environment: &Environment, id: &str, limit: Option<Duration>) -> Result<(), Failure> {
    let path = socket_path(environment, id);
    let ask = |command: &Command| {
        let stream = connect(&path, false).map_err(|error| no_such_socket(&error))?;
        Connection::send(stream, command)?.value()
    };
    let cid = ask(&Command::Cid)?;
    if ask(&Command::IsDebug)? == 0 {
        return Err(Failure::new(
            Code::CONSOLE,
            "The enclave was not started with the debug flag set, include '--debug-mode' in the run-enclave command",
        ));
    }
    println!("Connecting to the console for enclave {cid}...");
    let broken = |error: std::io::Error| Failure::new(Code::CONSOLE, error.to_string());
    let slot = path.file_stem().unwrap_or_default();
    let folder = environment.state.as_deref().unwrap_or(&environment.sockets);
    let mut file = File::open(background::console_path(folder, &slot.to_string_lossy())).map_err(broken)?;
    println!("Successfully connected to the console.");
    let began = Instant::now();
    loop {
        // Looked at before reading, so that the last words of an enclave are read after its end.
        let ended = !path.exists();
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(broken)?;
        std::io::stdout().write_all(&text).and_then(|()| std::io::stdout().flush()).map_err(broken)?;
        if ended || limit.is_some_and(|limit| began.elapsed() >= limit) {
            return Ok(());
        }
        std::thread::sleep(CONSOLE_POLL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_answers_are_an_empty_array_and_a_missing_one_is_counted() {
        let (printed, result) = gather::<Describe>(Vec::new(), 0, Form::Array, &[0]);
        assert_eq!((printed.as_str(), result), ("[]\n", Ok(())));
        let (_, result) = gather::<Describe>(vec![broadcast_answer("not JSON", Some(0))], 0, Form::Array, &[0]);
        assert_eq!(result.unwrap_err().code, Code::CONNECTION);
        let whole = r#"{"EnclaveName":"a","EnclaveID":"i-enc1","Terminated":true}"#;
        let (printed, result) = gather::<Terminate>(vec![broadcast_answer(whole, Some(22))], 0, Form::Single, &[0]);
        assert!(printed.contains("\"Terminated\": true"));
        assert_eq!(result.unwrap_err().code, Code::NOT_EXECUTED);
    }

    fn broadcast_answer(stdout: &str, status: Option<i32>) -> super::super::wire::Answer {
        super::super::wire::Answer { stdout: stdout.to_owned(), status }
    }

    #[test]
    fn a_control_socket_is_named_by_the_end_of_the_id() {
        let environment = Environment { sockets: "/run/nitro_enclaves".into(), ..Environment::of_this_process() };
        let path = socket_path(&environment, "i-0123456789abcdef0-enc0123456789abcde");
        assert_eq!(path, Path::new("/run/nitro_enclaves/0123456789abcde.sock"));
    }
}
