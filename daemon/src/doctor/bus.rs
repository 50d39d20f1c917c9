//! Asks systemd for its version, and polkit what it would allow. Both only answer; nothing is begun.

use super::Patient;
use crate::host::inventory::Roots;
use crate::procfs;
use enclaved_core::diagnosis::access::Account;
use enclaved_core::diagnosis::rights::{BusSeen, PolkitSeen, Right};
use enclaved_core::failure::Failure;
use enclaved_core::observed::Observation::{self, Known, Unknown};
use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use zbus::{Connection, OwnedVariant, Proxy, Variant};

/// What systemd asks polkit about when units are managed.
const MANAGE_UNITS: &str = "org.freedesktop.systemd1.manage-units";
/// Where polkit's rules are.
const RULES: [&str; 4] =
    ["etc/polkit-1/rules.d", "run/polkit-1/rules.d", "usr/local/share/polkit-1/rules.d", "usr/share/polkit-1/rules.d"];

/// Asks both over that connection.
pub(super) async fn look(
    connection: impl Future<Output = zbus::Result<Connection>>,
    patient: Patient,
    account: &Observation<Account>,
    rights: &[Right],
    roots: &Roots,
) -> (BusSeen, Observation<PolkitSeen>) {
    let connection = match connection.await {
        Ok(connection) => connection,
        Err(error) => {
            let why = said(&error);
            return (BusSeen::Unreachable(why.clone()), Known(PolkitSeen::Unreachable(why)));
        }
    };
    let systemd = match version(&connection).await {
        Ok(version) => BusSeen::Version(version),
        Err(error) => BusSeen::Unreachable(said(&error)),
    };
    (systemd, polkit(&connection, patient, account, rights, roots).await)
}

async fn version(connection: &Connection) -> zbus::Result<String> {
    let name = "org.freedesktop.systemd1";
    let manager = Proxy::new(connection, name, "/org/freedesktop/systemd1", "org.freedesktop.DBus.Properties").await?;
    let version: OwnedVariant = manager.call("Get", &("org.freedesktop.systemd1.Manager", "Version")).await?;
    Ok(String::try_from(version).unwrap_or_else(|_| "of an unknown version".to_owned()))
}

async fn polkit(
    connection: &Connection,
    patient: Patient,
    account: &Observation<Account>,
    rights: &[Right],
    roots: &Roots,
) -> Observation<PolkitSeen> {
    let account = match account {
        Known(account) if account.uid == 0 => return Known(PolkitSeen::Root),
        Known(account) => account,
        Unknown(failure) => return Unknown(failure.clone()),
    };
    let pid = match patient {
        Patient::Itself => std::process::id(),
        Patient::Running { daemon } => daemon,
        // Polkit is asked about processes, and there is none.
        Patient::NotRunning => return rule(roots),
    };
    let answers = async {
        let name = "org.freedesktop.PolicyKit1";
        let authority = Proxy::new(
            connection,
            name,
            "/org/freedesktop/PolicyKit1/Authority",
            "org.freedesktop.PolicyKit1.Authority",
        )
        .await?;
        let mut answers = BTreeMap::new();
        for right in rights {
            let allowed = allows(&authority, pid, account.uid, right).await?;
            answers.insert(right.clone(), allowed);
        }
        Ok::<_, zbus::Error>(answers)
    };
    match answers.await {
        Ok(answers) => Known(PolkitSeen::Answers(answers)),
        Err(error) if is_for_root_only(&error) => rule(roots),
        Err(error) => Known(PolkitSeen::Unreachable(said(&error))),
    }
}

/// Asks without any interaction (flags 0): polkit answers, and nothing is done.
async fn allows(authority: &Proxy<'_>, pid: u32, uid: u32, right: &Right) -> zbus::Result<bool> {
    let started = procfs::process(pid).ok().flatten().map_or(0, |process| process.identity.start_time);
    let uid = i32::try_from(uid).unwrap_or(-1);
    let subject: HashMap<&str, Variant<'_>> = HashMap::from([
        ("pid", Variant::from(pid)),
        ("start-time", Variant::from(started)),
        ("uid", Variant::from(uid)),
    ]);
    let details = HashMap::from([("unit", right.unit), ("verb", right.verb)]);
    let (allowed, _, _): (bool, bool, HashMap<String, String>) =
        authority.call("CheckAuthorization", &(("unix-process", subject), MANAGE_UNITS, details, 0_u32, "")).await?;
    Ok(allowed)
}

/// Only root, or whoever an action belongs to, may ask with details.
fn is_for_root_only(error: &zbus::Error) -> bool {
    const NOT_AUTHORIZED: &str = "org.freedesktop.PolicyKit1.Error.NotAuthorized";
    match error {
        zbus::Error::MethodError(name, ..) => name.as_str() == NOT_AUTHORIZED,
        zbus::Error::FDO(error) => matches!(**error, zbus::fdo::Error::AccessDenied(_)),
        _ => false,
    }
}

/// Looks for a rule of enclaved's by the name of its file. What it says only polkit knows.
fn rule(roots: &Roots) -> Observation<PolkitSeen> {
    let mut unseen = None;
    for folder in RULES.map(|folder| roots.root.join(folder)) {
        let entries = match std::fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => {
                let failure =
                    Failure::new(format!("could not look for a rule of polkit in {}: {error}", folder.display()));
                unseen = Some(failure.with_remedy("`sudo enclavectl doctor` asks polkit itself"));
                continue;
            }
        };
        let names = entries.filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()));
        if let Some(name) = names.filter(|name| name.contains("enclaved") && name.ends_with(".rules")).min() {
            return Known(PolkitSeen::ForRootOnly { rule: Some(folder.join(name).display().to_string()) });
        }
    }
    unseen.map_or(Known(PolkitSeen::ForRootOnly { rule: None }), Unknown)
}

fn said(error: &zbus::Error) -> String {
    Failure::from_error(error).message
}

/// The system's bus.
pub(super) async fn system() -> zbus::Result<Connection> {
    Connection::system().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt;
    use std::fs;
    use tokio::task::JoinSet;
    use zbus::connection::Builder;

    const START: Right = Right { verb: "start", unit: "enclaved-proxy.service" };
    const STOP: Right = Right { verb: "stop", unit: "enclave@x-1.service" };

    /// Subject, action, details, flags, and a name by which it could be cancelled.
    type Question<'a> = (Subject<'a>, String, HashMap<String, String>, u32, String);
    type Subject<'a> = (String, HashMap<String, Variant<'a>>);

    /// How the other end answers.
    #[derive(Clone, Copy)]
    enum Peer {
        /// systemd answers, and polkit allows starting alone.
        Good,
        /// Polkit answers root only.
        RootOnly,
        /// Neither is there.
        Nobody,
    }

    /// A connection to a bus on which systemd and polkit are made up.
    async fn bus(peer: Peer, tasks: &mut JoinSet<()>) -> Connection {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let guid = zbus::Guid::generate();
        let server = Builder::unix_stream(theirs).server(guid).p2p().build();
        let (client, server) = tokio::join!(Builder::unix_stream(ours).p2p().build(), server);
        let server = server.unwrap();
        tasks.spawn(async move {
            let mut calls = zbus::MessageStream::from(&server);
            while let Some(Ok(call)) = calls.next().await {
                let header = call.header();
                let member = header.member().unwrap().as_str().to_owned();
                match (peer, member.as_str()) {
                    (Peer::Good | Peer::RootOnly, "Get") => {
                        server.reply(&header, &(Variant::from("252.39"),)).await.unwrap();
                    }
                    (Peer::Good, "CheckAuthorization") => {
                        let body = call.body();
                        let (_, action, details, flags, _): Question<'_> = body.deserialize().unwrap();
                        assert_eq!((action.as_str(), flags), (MANAGE_UNITS, 0));
                        let answer = (details["verb"] == "start", false, HashMap::<String, String>::new());
                        server.reply(&header, &(answer,)).await.unwrap();
                    }
                    (Peer::RootOnly, "CheckAuthorization") => {
                        let name = "org.freedesktop.PolicyKit1.Error.NotAuthorized";
                        server.reply_error(&header, name, &("only root may pass details",)).await.unwrap();
                    }
                    _ => {
                        let name = "org.freedesktop.DBus.Error.ServiceUnknown";
                        server.reply_error(&header, name, &("nobody of that name",)).await.unwrap();
                    }
                }
            }
        });
        client.unwrap()
    }

    fn account(uid: u32) -> Observation<Account> {
        let groups = [uid].into();
        Known(Account { name: "enclaved".to_owned(), uid, groups, is_this_process: true, how: "test".to_owned() })
    }

    async fn seen(peer: Peer, uid: u32, roots: &Roots) -> (BusSeen, Observation<PolkitSeen>) {
        let mut tasks = JoinSet::new();
        let connection = bus(peer, &mut tasks).await;
        look(async { Ok(connection) }, Patient::Itself, &account(uid), &[START, STOP], roots).await
    }

    #[tokio::test]
    async fn systemd_and_polkit_answer_and_a_right_that_is_refused_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let (systemd, polkit) = seen(Peer::Good, 990, &Roots::below(folder.path())).await;
        assert_eq!(systemd, BusSeen::Version("252.39".to_owned()));
        assert_eq!(polkit, Known(PolkitSeen::Answers([(START, true), (STOP, false)].into())));
        let (_, polkit) = seen(Peer::Good, 0, &Roots::below(folder.path())).await;
        assert_eq!(polkit, Known(PolkitSeen::Root));
    }

    #[tokio::test]
    async fn where_polkit_answers_root_only_its_rules_are_looked_through() {
        let folder = tempfile::tempdir().unwrap();
        let roots = Roots::below(folder.path());
        let (_, polkit) = seen(Peer::RootOnly, 990, &roots).await;
        assert_eq!(polkit, Known(PolkitSeen::ForRootOnly { rule: None }));
        let rules = folder.path().join("usr/share/polkit-1/rules.d");
        fs::create_dir_all(&rules).unwrap();
        fs::write(rules.join("50-enclaved.rules"), "").unwrap();
        let (_, polkit) = seen(Peer::RootOnly, 990, &roots).await;
        let path = rules.join("50-enclaved.rules").display().to_string();
        assert_eq!(polkit, Known(PolkitSeen::ForRootOnly { rule: Some(path) }));
    }

    #[tokio::test]
    async fn a_bus_without_them_and_a_bus_that_is_not_there_are_unreachable() {
        let folder = tempfile::tempdir().unwrap();
        let roots = Roots::below(folder.path());
        let (systemd, polkit) = seen(Peer::Nobody, 990, &roots).await;
        assert!(matches!(&systemd, BusSeen::Unreachable(why) if why.contains("nobody of that name")), "{systemd:?}");
        assert!(matches!(polkit, Known(PolkitSeen::Unreachable(_))));
        let address = format!("unix:path={}/no-bus", folder.path().display());
        let nowhere = async move { Builder::address(address.as_str()).build().await };
        let (systemd, _) = look(nowhere, Patient::Itself, &account(990), &[START], &roots).await;
        assert!(matches!(systemd, BusSeen::Unreachable(_)));
    }
}
