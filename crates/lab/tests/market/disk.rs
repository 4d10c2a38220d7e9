//! A VM with a disk: what it wrote there is there after it slept and after it moved.

use anyhow::{Result, ensure};
use onde_client::api::SettledBy;

use crate::world::{World, wait};

/// Fills the first 4 MiB with noise; then writes numbered blocks round and round behind them, reads older ones back, and
/// now and then all of the noise, past the page cache. Says a number for each block, and nothing else as long as the
/// disk holds what was written.
const WRITER: &str = r#"
dd if=/dev/urandom of=/dev/shm/noise bs=1M count=4 2>/dev/null
dd if=/dev/shm/noise of=/dev/vda bs=1M oflag=direct 2>/dev/null
sum=$(sha256sum < /dev/shm/noise); rm /dev/shm/noise
i=0; while [ $i -lt 4000 ]; do
  i=$((i + 1)); printf '%4096d' $i > /dev/shm/block
  dd if=/dev/shm/block of=/dev/vda bs=4096 seek=$((1024 + i % 64)) conv=notrunc oflag=direct 2>/dev/null
  k=$((i > 12 ? i - 12 : i))
  got=$(dd if=/dev/vda bs=4096 skip=$((1024 + k % 64)) count=1 iflag=direct 2>/dev/null)
  [ $((got)) = $k ] || echo "block $k holds $got"
  [ $((i % 8)) != 0 ] || [ "$(dd if=/dev/vda bs=1M count=4 iflag=direct 2>/dev/null | sha256sum)" = "$sum" ] ||
    echo "the noise changed before block $i"
  echo $i
done"#;
/// Blocks after each act: all of the noise is read at least once, and blocks from before.
const MORE: u64 = 10;

/// How many blocks were written; no other word was said.
fn blocks(told: &str) -> Result<u64> {
    let whole = told.rfind('\n').map_or("", |end| &told[..end]);
    for (line, number) in whole.lines().zip(1u64..) {
        ensure!(line == number.to_string(), "{line:?} instead of {number}");
    }
    Ok(whole.lines().count() as u64)
}

fn goes_on(world: &World, name: &str) -> Result<()> {
    let before = blocks(&world.onde(["logs", name])?)?;
    wait("the program to go on", || Ok(blocks(&world.onde(["logs", name])?)? >= before + MORE))
}

pub fn goes_along(world: &World) -> Result<()> {
    let before = world.balance()?;
    let order = ["run", "-d", "--name", "disk", "--memory", "128", "--disk", "256", "--node", "1"];
    let paid = ["--tokens", "100", "--budget", "400", "--file", "/usr/bin/dd"];
    let program = ["--file", "/usr/bin/sha256sum", "--file", "/usr/bin/rm", "--", "/bin/sh", "-c"];
    world.onde([&order[..], &paid, &program, &[WRITER]].concat())?;
    goes_on(world, "disk")?;
    world.onde(["suspend", "disk"])?;
    world.onde(["resume", "disk"])?;
    goes_on(world, "disk")?;
    world.onde(["migrate", "disk", "2"])?;
    goes_on(world, "disk")?;
    // A disk can hold more than the memory that the VM has.
    let fill = ["if=/dev/zero", "of=/dev/vda", "bs=1M", "seek=16", "count=200", "oflag=direct"];
    world.onde([&["exec", "disk", "--", "/usr/bin/dd"], &fill[..]].concat())?;
    goes_on(world, "disk")?;
    world.onde(["stop", "disk"])?;
    let job = world.newest_job()?;
    ensure!(job.settled_by == Some(SettledBy::Certificate), "{:?}", job.settled_by);
    ensure!(before > world.balance()?, "a disk for nothing");
    Ok(())
}
