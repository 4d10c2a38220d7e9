//! `onde wallet statement`: what each job cost, by day: the broker's journal, with the names that the job files know.

use anyhow::Result;
use onde_client::api::{Entry, Hex};
use onde_client::job::Job;
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use super::{print, print_json};
use crate::cluster::Cluster;
use crate::table::{cost, render, tokens};

const DAY_S: u64 = 86_400;
/// Pages of the journal that are read: half a million lines.
const PAGES_MAX: usize = 1000;

/// What one job moved in one day; without a job, what was put into the account.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
struct Row {
    /// By the UTC, as 2026-01-31.
    day: String,
    job: Option<Hex<16>>,
    name: Option<String>,
    program: Option<String>,
    /// Whether it is over and settled, where its file is still there.
    settled: Option<bool>,
    bought_micro: u64,
    back_micro: u64,
}

pub fn run(context: Option<&str>, days: u32, json: bool) -> Result<()> {
    let cluster = Cluster::open(context)?;
    let today = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs() / DAY_S;
    let from_s = (today + 1).saturating_sub(days.into()) * DAY_S;
    let rows = rows(&journal(&cluster, from_s)?, &cluster.jobs.list()?);
    if json { print_json(&rows) } else { print(&text(&rows)) }
}

/// The journal's lines since `from_s`, newest first.
fn journal(cluster: &Cluster, from_s: u64) -> Result<Vec<Entry>> {
    let (mut entries, mut before) = (Vec::new(), None);
    for _ in 0..PAGES_MAX {
        let page = cluster.broker.journal(before)?;
        let is_last = page.entries.last().is_none_or(|entry| entry.at < from_s);
        entries.extend(page.entries.into_iter().filter(|entry| entry.at >= from_s));
        before = page.next;
        if is_last || before.is_none() {
            break;
        }
    }
    Ok(entries)
}

/// One row for each day and job, the newest day first.
fn rows(entries: &[Entry], jobs: &[Job]) -> Vec<Row> {
    let mut rows: BTreeMap<_, Row> = BTreeMap::new();
    for entry in entries {
        let day = entry.at / DAY_S;
        let row = rows.entry((std::cmp::Reverse(day), entry.job)).or_insert_with(|| {
            let job = jobs.iter().find(|job| Some(job.id) == entry.job);
            Row {
                day: date(day),
                job: entry.job,
                name: job.and_then(|job| job.name.clone()),
                program: job.map(|job| job.title.clone()),
                settled: job.map(|job| job.settled.is_some()),
                ..Row::default()
            }
        });
        let amount = match entry.delta_micro {
            ..0 => &mut row.bought_micro,
            _ => &mut row.back_micro,
        };
        *amount = amount.saturating_add(entry.delta_micro.unsigned_abs());
    }
    rows.into_values().collect()
}

/// A day since 1970 as year, month and day of the Gregorian calendar (Howard Hinnant, "chrono-compatible low-level date
/// algorithms": eras of 400 years that begin in March).
fn date(day: u64) -> String {
    let day = day + 719_468;
    let (era, of_era) = (day / 146_097, day % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let (of_month, month) = (of_year - (153 * month + 2) / 5 + 1, (month + 2) % 12 + 1);
    let year = era * 400 + year + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{of_month:02}")
}

fn text(rows: &[Row]) -> String {
    let amount =
        |micro: u64, show: fn(u64) -> String| if micro == 0 { String::new() } else { show(micro) };
    let cells = |row: &Row| {
        let state = match (row.job, row.settled) {
            (None, _) => "credit",
            (_, Some(false)) => "open",
            _ => "",
        };
        vec![
            row.day.clone(),
            row.job.map_or(String::new(), |job| job.to_string()[..8].to_owned()),
            row.name.clone().unwrap_or_default(),
            amount(row.bought_micro, cost),
            amount(row.back_micro, tokens),
            state.to_owned(),
            row.program.clone().unwrap_or_default(),
        ]
    };
    let table: Vec<_> = rows.iter().map(cells).collect();
    let of_jobs = || rows.iter().filter(|row| row.job.is_some());
    let bought = of_jobs().map(|row| row.bought_micro).sum::<u64>();
    let back = of_jobs().map(|row| row.back_micro).sum::<u64>();
    let head = ["DAY (UTC)", "JOB", "NAME", "BOUGHT", "BACK", "", "PROGRAM"];
    let (bought_text, back_text) = (cost(bought), tokens(back));
    let total = format!("jobs bought {bought_text} tokens and gave {back_text} back");
    let open = if rows.iter().any(|row| row.settled == Some(false)) {
        "; open ones give back what they do not use"
    } else {
        ""
    };
    render(&head, &table) + "\n" + &total + open + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_have_their_dates() {
        let check = |day, expect| assert_eq!(date(day), expect);
        check(0, "1970-01-01");
        check(11_016, "2000-02-29");
        check(11_017, "2000-03-01");
        check(20_453, "2025-12-31");
        check(20_454, "2026-01-01");
    }

    #[test]
    fn a_job_has_a_row_for_each_day_and_all_adds_up() {
        let entry = |id, at, delta_micro, job: Option<u8>| Entry {
            id,
            at,
            delta_micro,
            reason: String::new(),
            job: job.map(|job| Hex([job; 16])),
        };
        let entries = [
            entry(5, DAY_S + 9, 4_000_000, Some(1)),
            entry(4, DAY_S + 1, -9_000_000, Some(1)),
            entry(3, 50, -5_000_000, Some(1)),
            entry(2, 40, -7_000_000, Some(2)),
            entry(1, 30, 90_000_000, None),
        ];
        let rows = rows(&entries, &[]);
        let told: Vec<_> =
            rows.iter().map(|row| (&row.day[..], row.bought_micro, row.back_micro)).collect();
        assert_eq!(
            told,
            [
                ("1970-01-02", 9_000_000, 4_000_000),
                ("1970-01-01", 0, 90_000_000),
                ("1970-01-01", 5_000_000, 0),
                ("1970-01-01", 7_000_000, 0),
            ]
        );
        assert!(text(&rows).ends_with("\njobs bought 21.00 tokens and gave 4.00 back\n"));
    }
}
