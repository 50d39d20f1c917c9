//! The Nitro side of a simulated host: a folder with its sysfs tree, its vsock sockets, and a `bin/nitro-cli` that knows
//! where all of it is.
//!
//! Everything lives below one short path in `/tmp`, as socket paths end at 107 bytes; when the handle is dropped, every
//! process that has to do with it is ended and the folder is removed.

use crate::application::Application;
use crate::binaries;
use crate::eif::Eif;
use crate::nitro_cli::faults::{self, Hazard};
use crate::nitro_cli::{Call, Environment, SETTINGS_FILE, calls};
use crate::processes;
use std::fmt::Write as _;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use std::{fs, thread};
use tempfile::TempDir;

/// How much of an instance is set aside for enclaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// Whole cores in the enclaves' CPU pool, as pairs of siblings.
    pub cores: Vec<[u32; 2]>,
    /// Hugepages of 2 MiB.
    pub hugepages: u64,
    /// CPUs of the whole instance.
    pub cpus: u32,
}

impl Shape {
    /// A host of 8 CPUs that leaves 6 of them and 2 GiB to enclaves (as an m5.2xlarge, with little memory).
    pub fn small() -> Self {
        Self { cores: vec![[1, 5], [2, 6], [3, 7]], hugepages: 1024, cpus: 8 }
    }

    /// The files of such a host's sysfs, by their path below its root.
    pub fn sysfs_files(&self) -> Vec<(String, String)> {
        let mut files = Vec::new();
        let mut write = |path: String, contents: String| files.push((path, contents + "\n"));
        let mut pool: Vec<u32> = self.cores.iter().flatten().copied().collect();
        pool.sort_unstable();
        let pool: Vec<String> = pool.iter().map(u32::to_string).collect();
        write("module/nitro_enclaves/parameters/ne_cpus".to_owned(), pool.join(","));
        for name in ["nr_hugepages", "free_hugepages"] {
            let file = format!("devices/system/node/node0/hugepages/hugepages-2048kB/{name}");
            write(file, self.hugepages.to_string());
        }
        write("devices/system/node/node0/hugepages/hugepages-2048kB/surplus_hugepages".to_owned(), "0".to_owned());
        // Twice the pages, and 4 GiB, so that what is set aside leaves the parent its own.
        let kib = (self.hugepages * 2048 * 2).saturating_add(4 << 20);
        let meminfo = format!("Node 0 MemTotal: {kib} kB\nNode 0 MemFree: {kib} kB");
        write("devices/system/node/node0/meminfo".to_owned(), meminfo);
        write("devices/system/clocksource/clocksource0/current_clocksource".to_owned(), "tsc".to_owned());
        let last = self.cpus.saturating_sub(1);
        // What is in the pool is offline: the node's list leaves it out, but every CPU keeps the link to its node.
        let offline = |cpu: &u32| self.cores.iter().flatten().any(|other| other == cpu);
        let online: Vec<String> = (0..self.cpus).filter(|cpu| !offline(cpu)).map(|cpu| cpu.to_string()).collect();
        write("devices/system/node/node0/cpulist".to_owned(), online.join(","));
        write("devices/system/cpu/online".to_owned(), online.join(","));
        write("devices/system/cpu/present".to_owned(), format!("0-{last}"));
        let half = (self.cpus / 2).max(1);
        for cpu in (0..self.cpus).filter(|cpu| !offline(cpu)) {
            let file = format!("devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
            write(file, format!("{},{}", cpu % half, cpu % half + half));
        }
        for [a, b] in &self.cores {
            for cpu in [a, b] {
                let file = format!("devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
                write(file, format!("{a},{b}"));
            }
        }
        write("devices/virtual/dmi/id/board_asset_tag".to_owned(), "i-0123456789abcdef0".to_owned());
        files
    }

    /// The folders of such a host's sysfs that stand for links, by their path below its root.
    pub fn sysfs_folders(&self) -> Vec<String> {
        (0..self.cpus).map(|cpu| format!("devices/system/cpu/cpu{cpu}/node0")).collect()
    }
}

/// The simulated host.
#[derive(Debug)]
pub struct NitroHost {
    folder: TempDir,
}

impl NitroHost {
    /// Lays the host out.
    ///
    /// # Errors
    /// When the stand-in programs have not been built, or the folder can't be written.
    pub fn new(shape: &Shape) -> io::Result<Self> {
        let folder = tempfile::Builder::new().prefix("encl-").rand_bytes(6).tempdir_in("/tmp")?;
        let host = Self { folder };
        for name in ["bin", "sockets", "logs", "vsock", "state"] {
            fs::create_dir(host.path().join(name))?;
        }
        host.write_sysfs(shape)?;
        std::os::unix::fs::symlink(binaries::find("nitro-cli")?, host.nitro_cli())?;
        let mut settings = String::new();
        for (name, value) in host.environment().variables() {
            // Writing to a String can't fail.
            let _ignored = writeln!(settings, "{name}={}", value.display());
        }
        fs::write(host.nitro_cli().with_file_name(SETTINGS_FILE), settings)?;
        Ok(host)
    }

    fn write_sysfs(&self, shape: &Shape) -> io::Result<()> {
        let root = self.sysfs();
        for folder in shape.sysfs_folders() {
            fs::create_dir_all(root.join(folder))?;
        }
        for (path, contents) in shape.sysfs_files() {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap_or(&path))?;
            fs::write(path, contents)?;
        }
        Ok(())
    }

    /// The folder below which everything is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The `nitro-cli` of this host.
    pub fn nitro_cli(&self) -> PathBuf {
        self.path().join("bin/nitro-cli")
    }

    /// The root of its sysfs tree.
    pub fn sysfs(&self) -> PathBuf {
        self.path().join("sys")
    }

    /// The folder of its vsock sockets.
    pub fn vsock(&self) -> PathBuf {
        self.path().join("vsock")
    }

    /// Where its nitro-cli works.
    pub fn environment(&self) -> Environment {
        Environment {
            sysfs: self.sysfs(),
            sockets: self.path().join("sockets"),
            logs: self.path().join("logs"),
            vsock: Some(self.vsock()),
            state: Some(self.path().join("state")),
            faults: Some(self.path().join("faults.json")),
            enclave_binary: None,
        }
    }

    /// A nitro-cli command of this host, with an empty environment.
    pub fn command(&self) -> Command {
        let mut command = Command::new(self.nitro_cli());
        command.env_clear();
        command
    }

    /// Replaces the hazards of its nitro-cli.
    ///
    /// # Errors
    /// When they can't be written.
    pub fn switch_on(&self, hazards: &[Hazard]) -> io::Result<()> {
        faults::switch_on(&self.path().join("faults.json"), hazards)
    }

    /// The nitro-cli commands run so far.
    ///
    /// # Errors
    /// When the record can't be read.
    pub fn calls(&self) -> io::Result<Vec<Call>> {
        calls(&self.path().join("state"))
    }

    /// Free hugepages of 2 MiB, as sysfs shows them.
    ///
    /// # Errors
    /// When the file can't be read.
    pub fn free_hugepages(&self) -> io::Result<u64> {
        let file = "devices/system/node/node0/hugepages/hugepages-2048kB/free_hugepages";
        fs::read_to_string(self.sysfs().join(file))?.trim().parse().map_err(io::Error::other)
    }

    /// Connects to a port of an enclave, as a host process does.
    ///
    /// # Errors
    /// When there is no such enclave, or nothing listens on the port.
    pub fn connect(&self, cid: u32, port: u32) -> io::Result<UnixStream> {
        let mut stream = UnixStream::connect(self.vsock().join(format!("{cid}.sock")))?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
        let mut answer = Vec::new();
        // Byte by byte: what follows belongs to the service.
        while !answer.ends_with(b"\n") && answer.len() < 32 {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            answer.extend(byte);
        }
        if answer.starts_with(b"OK ") { Ok(stream) } else { Err(io::ErrorKind::ConnectionRefused.into()) }
    }

    /// Every process that has to do with this host.
    pub fn processes(&self) -> Vec<i32> {
        processes::carrying(self.path())
    }
}

impl Drop for NitroHost {
    fn drop(&mut self) {
        let left = processes::end_all(self.path());
        if !left.is_empty() && !thread::panicking() {
            eprintln!("simulated host {}: processes {left:?} can't be ended", self.path().display());
        }
    }
}

/// An image of an application, as a file's bytes: with a kernel and a first ramdisk that are always the same.
pub fn image(application: &Application) -> Vec<u8> {
    let first = b"simulated init".to_vec();
    Eif::new(*b"simulated kernel", "reboot=k panic=30", vec![first, application.to_line()]).to_bytes()
}
