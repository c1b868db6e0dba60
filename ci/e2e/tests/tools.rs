//! Initiators that are neither Linux's driver nor ours: Debian's aoetools and iPXE (case 86 of the conformance list).
//!
//! Of aoetools these run that need no driver; aoe-discover, aoe-stat and the others write to `/dev/etherd` of the driver,
//! as the tests in `vm.rs` do.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use torus_e2e::{Lab, ci_dir, eventually};

/// Runs a program on the initiators' host.
fn on_initiator(line: &str) -> Result<Output> {
    // None of the tools ends by itself when nobody answers.
    Command::new(ci_dir().join("lab"))
        .args(["exec", "ini", "--", "timeout", "20"])
        .args(line.split_whitespace())
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {line}"))
}

/// What a tool printed; it must succeed.
fn tool(line: &str) -> Result<String> {
    let output = on_initiator(line)?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{line} ended with {}:\n{out}{err}", output.status);
    Ok(format!("{out}{err}"))
}

/// The config string that aoecfg reads.
fn config_string(slot: u8) -> Result<String> {
    Ok(tool(&format!("aoecfg -t 1 1 {slot} eth0"))?.trim_end().to_owned())
}

#[test]
fn case_86_aoetools_find_identify_check_and_configure_exports() -> Result<()> {
    let lab = Lab::up("--nodes 1 --store file --size 512MiB --mtu 9000 --etcd 1")?;
    lab.sh("torusctl volume create open 16MiB")?;
    lab.sh("torusblk aoe open 1.1 --allow-aoe-config")?;
    lab.export("closed", "16MiB", "1.2")?;

    // aoeping: 1056 bytes of filler, and the answer it insists on is of 60 bytes at least.
    tool("aoeping 1 1 eth0")?;
    let said = tool("aoeping -v -I 1 2 eth0")?;
    ensure!(said.contains("found e1.2 with mac") && said.contains("Torus volume"), "{said}");
    let silent = on_initiator("aoeping -s 2 1 3 eth0")?;
    ensure!(!silent.status.success(), "aoeping found an export that is not there");

    // aoe-sancheck: IDENTIFY with ever more payload behind it, as large as the link's frames.
    let said = tool("aoe-sancheck")?;
    for name in ["e1.1", "e1.2"] {
        let row: Vec<_> =
            said.lines().find(|line| line.starts_with(name)).unwrap_or_default().split_whitespace().collect();
        ensure!(row == [name, "1", "8192", "eth0"], "aoe-sancheck says {row:?} of {name}:\n{said}");
    }

    // aoecfg, with a policy that lets it.
    ensure!(config_string(1)?.is_empty(), "a new export has a config string");
    let said = tool("aoecfg -t 2 -c set -s one 1 1 eth0")?;
    ensure!(said.trim() == "one", "the answer to a set carries {said}");
    ensure!(config_string(1)? == "one", "the string that was set is not read");
    let said = tool("aoecfg -t 2 -c set -s two 1 1 eth0")?;
    ensure!(said.trim() == "*badcfg*", "a set where there is a string is answered with {said}");
    ensure!(config_string(1)? == "one", "set replaced a string");
    let answers = |command: &str| Ok::<_, anyhow::Error>(!tool(command)?.trim().is_empty());
    ensure!(answers("aoecfg -t 1 -c test -s one 1 1 eth0")?, "no answer to the exact string");
    ensure!(!answers("aoecfg -t 1 -c test -s on 1 1 eth0")?, "an answer to a string that is not exact");
    ensure!(answers("aoecfg -t 1 -c prefix -s on 1 1 eth0")?, "no answer to a prefix");
    ensure!(!answers("aoecfg -t 1 -c prefix -s none 1 1 eth0")?, "an answer to what is no prefix");
    tool("aoecfg -t 2 -c fset -s two 1 1 eth0")?;
    ensure!(config_string(1)? == "two", "the string that was forced is not read");
    // Without one.
    let said = tool("aoecfg -t 2 -c fset -s mine 1 2 eth0")?;
    ensure!(said.trim() == "*badarg*", "a stranger's set is answered with {said}");
    ensure!(config_string(2)?.is_empty(), "a stranger set a config string");
    // Of all exports at once.
    let said = tool("aoecfg -t 2 eth0")?;
    ensure!(said.contains("1.1\ttwo") && said.contains("1.2\t"), "{said}");

    // It was stored before it was answered.
    lab.sh("kill n1 all")?;
    lab.sh("start n1")?;
    // aoecfg asks once; the export is served again in a moment.
    eventually("the config string after a restart", Duration::from_secs(30), || {
        let string = config_string(1)?;
        ensure!(string.is_empty() || string == "two", "the config string is now {string}");
        Ok(string == "two")
    })?;
    lab.passed()
}

/// The disk that iPXE boots: the boot sector, and a second sector with a text that it prints.
fn boot_disk(lab: &Lab, text: &str) -> Result<Vec<u8>> {
    let source = ci_dir().join("ipxe-boot-sector.s");
    let (object, binary) = (lab.file("boot.o"), lab.file("boot.bin"));
    let run = |program: &str, options: &[&str], output: &Path, input: &Path| -> Result<()> {
        let done = Command::new(program).args(options).arg("-o").arg(output).arg(input).output();
        let done = done.with_context(|| format!("cannot run {program} (package binutils)"))?;
        ensure!(done.status.success(), "{program}: {}", String::from_utf8_lossy(&done.stderr));
        Ok(())
    };
    run("as", &["--32"], &object, &source)?;
    run("ld", &["-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary"], &binary, &object)?;
    let mut disk = fs::read(&binary)?;
    ensure!(disk.len() == 512, "a boot sector has 512 bytes, not {}", disk.len());
    disk.extend_from_slice(text.as_bytes());
    disk.resize(1024, 0);
    Ok(disk)
}

#[test]
fn case_86_ipxe_boots_from_an_export_reads_and_writes() -> Result<()> {
    let lab = Lab::up("--nodes 1 --store file --size 512MiB --mtu 1500 --etcd 1")?;
    lab.export("v", "16MiB", "1.1")?;
    let text = "BOOT read what was put there\r\n";
    let disk = boot_disk(&lab, text)?;
    let image = lab.file("disk");
    fs::write(&image, &disk)?;
    let put = Command::new(ci_dir().join("lab"))
        .args(["exec", "ini", "--", "torus-sectors", "eth0", "1.1", "write", "0"])
        .stdin(File::open(&image)?)
        .output()?;
    ensure!(put.status.success(), "torus-sectors: {}", String::from_utf8_lossy(&put.stderr));

    let output = Command::new(ci_dir().join("vm"))
        .args(["ipxe", "--target", "1.1", "--until", "BOOT wrote", "--log"])
        .arg(lab.file("console.log"))
        .stdin(Stdio::null())
        .output()
        .context("cannot run ci/vm")?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "iPXE did not boot:\n{out}{err}");
    ensure!(out.contains(text.trim_end()), "iPXE's disk read something else:\n{out}");
    // What the boot sector wrote is on the volume: the second sector, on the third.
    let third = on_initiator("torus-sectors eth0 1.1 read 2 1")?.stdout;
    ensure!(third == disk[512..], "iPXE's disk wrote something else: {}", String::from_utf8_lossy(&third));
    lab.passed()
}
