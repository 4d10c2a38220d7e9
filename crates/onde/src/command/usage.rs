//! `onde usage`: what a job's meters said each time the broker asked, and what each of them charged in between.

use anyhow::Result;
use onde_client::api::{Prices, Sample, Usage};
use onde_wire::packet;

use super::{print, print_json};
use crate::cluster::Cluster;
use crate::table::{cost, render};

/// Columns of the CSV, for spreadsheets and scripts.
const COLUMNS: &str = "at,age_ms,node,cpu_us,mem_mib_ms,sent_bytes,disk_mib_ms,vcpu_micro,mem_micro,sent_micro,\
    disk_micro,charged_micro,spent_micro,first_token,last_token\n";

pub fn run(job: &str, csv: bool, json: bool) -> Result<()> {
    let (cluster, job) = Cluster::open_for(job)?;
    let usage = cluster.broker.usage(&job.id.0)?;
    match (csv, json) {
        (true, _) => print(&as_csv(&usage)),
        (_, true) => print_json(&usage),
        _ => print(&as_table(&usage)),
    }
}

/// Micro-tokens that each meter had charged by then: processor, memory, network, disk.
fn charges(prices: Option<Prices>, sample: &Sample) -> [u64; 4] {
    let Some(prices) = prices else { return [0; 4] };
    let prices = packet::Prices {
        vcpu_s: prices.vcpu_s,
        gib_s: prices.gib_s,
        gib_sent: prices.gib_sent,
        disk_gib_s: prices.disk_gib_s,
    };
    [
        prices.cost_micro(sample.cpu_us, 0, 0, 0),
        prices.cost_micro(0, sample.mem_mib_ms, 0, 0),
        prices.cost_micro(0, 0, sample.sent_bytes, 0),
        prices.cost_micro(0, 0, 0, sample.disk_mib_ms),
    ]
}

/// One line for each look: meters as they stood, charges since the look before, the tokens that these used.
fn as_csv(usage: &Usage) -> String {
    let mut out = COLUMNS.to_owned();
    let (mut before, mut spent) = ([0; 4], 0);
    for sample in &usage.samples {
        let now = charges(usage.prices, sample);
        let since: [u64; 4] = std::array::from_fn(|meter| now[meter] - before[meter]);
        let [vcpu, mem, sent, disk] = since;
        let Sample { at, age_ms, cpu_us, mem_mib_ms, sent_bytes, disk_mib_ms, spent_micro, .. } =
            *sample;
        let (node, charged) = (usage.node, spent_micro.saturating_sub(spent));
        // A token that two lines share is used by both.
        let first = (spent / usage.value_micro + 1).min(spent_micro.div_ceil(usage.value_micro));
        let last = spent_micro.div_ceil(usage.value_micro);
        out.push_str(&format!(
            "{at},{age_ms},{node},{cpu_us},{mem_mib_ms},{sent_bytes},{disk_mib_ms},{vcpu},{mem},{sent},{disk},\
             {charged},{spent_micro},{first},{last}\n"
        ));
        (before, spent) = (now, spent_micro);
    }
    out
}

fn as_table(usage: &Usage) -> String {
    let Some(last) = usage.samples.last() else {
        return "the broker has not seen it run\n".to_owned();
    };
    let [vcpu, mem, sent, disk] = charges(usage.prices, last).map(cost);
    let gib_s = |mib_ms: u64| format!("{:.1} GiB-s", mib_ms as f64 / 1_024_000.0);
    let row = |meter: &str, used: String, tokens: String| vec![meter.to_owned(), used, tokens];
    let rows = [
        row("processor", format!("{:.1} s", last.cpu_us as f64 / 1e6), vcpu),
        row("memory", gib_s(last.mem_mib_ms), mem),
        row("network", format!("{:.1} MiB", last.sent_bytes as f64 / f64::from(1 << 20)), sent),
        row("disk", gib_s(last.disk_mib_ms), disk),
        row("all", format!("{:.1} s", last.age_ms as f64 / 1e3), cost(last.spent_micro)),
    ];
    render(&["METER", "USED", "TOKENS"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use onde_client::api::Hex;

    fn sample(seconds: u64) -> Sample {
        let prices = packet::Prices { vcpu_s: 3, gib_s: 7, gib_sent: 0, disk_gib_s: 0 };
        let (cpu_us, mem_mib_ms) = (seconds * 333_333, seconds * 256 * 1000);
        Sample {
            at: 100 + seconds,
            age_ms: seconds * 1000,
            spent_micro: prices.cost_micro(cpu_us, mem_mib_ms, 0, 0),
            last_index: 10,
            cpu_us,
            mem_mib_ms,
            sent_bytes: 5,
            disk_mib_ms: 0,
        }
    }

    #[test]
    fn is_told_as_a_table_and_look_by_look() {
        let prices =
            Prices { vcpu_s: 800_000, gib_s: 200_000, gib_sent: 1 << 20, disk_gib_s: 10_000 };
        let look = |seconds: u64| Sample {
            age_ms: seconds * 1000,
            cpu_us: seconds * 500_000,
            mem_mib_ms: seconds * 512_000,
            sent_bytes: seconds << 20,
            disk_mib_ms: seconds * 1_024_000,
            spent_micro: seconds * 511_024,
            ..sample(seconds)
        };
        let samples = vec![look(2), look(10)];
        let mut usage = Usage {
            job: Hex([1; 16]),
            node: 3,
            value_micro: 1_000_000,
            prices: Some(prices),
            samples,
            next: None,
        };
        assert_eq!(
            as_table(&usage),
            "METER      USED        TOKENS\n\
             processor  5.0 s       4.00\n\
             memory     5.0 GiB-s   1.00\n\
             network    10.0 MiB    0.02\n\
             disk       10.0 GiB-s  0.10\n\
             all        10.0 s      5.12\n"
        );
        let lines = [
            "102,2000,3,1000000,1024000,2097152,2048000,800000,200000,2048,20000,1022048,1022048,1,2",
            "110,10000,3,5000000,5120000,10485760,10240000,3200000,800000,8192,80000,4088192,5110240,2,6",
        ];
        assert_eq!(as_csv(&usage), format!("{COLUMNS}{}\n", lines.join("\n")));
        usage.samples.clear();
        assert_eq!(as_table(&usage), "the broker has not seen it run\n");
        assert_eq!(as_csv(&usage), COLUMNS);
    }

    #[test]
    fn charges_of_all_lines_add_up_to_the_meters_and_to_what_was_spent() {
        let samples: Vec<_> = (0..50).map(|second| sample(second * 2 + 1)).collect();
        let last = samples[49];
        let prices = Some(Prices { vcpu_s: 3, gib_s: 7, gib_sent: 0, disk_gib_s: 0 });
        let usage =
            Usage { job: Hex([1; 16]), node: 1, value_micro: 10, prices, samples, next: None };
        let csv = as_csv(&usage);
        let lines: Vec<Vec<u64>> = csv
            .lines()
            .skip(1)
            .map(|line| line.split(',').map(|cell| cell.parse().expect("a number")).collect())
            .collect();
        assert_eq!((lines.len(), lines[0].len()), (50, COLUMNS.split(',').count()));
        let sum = |column: usize| lines.iter().map(|line| line[column]).sum::<u64>();
        let parts = (7..11).map(sum).collect::<Vec<_>>();
        assert_eq!(parts, charges(prices, &last));
        assert_eq!((parts.iter().sum::<u64>(), sum(11)), (last.spent_micro, last.spent_micro));
        assert_eq!((lines[0][13], lines[49][14]), (1, last.spent_micro.div_ceil(10)));
        for pair in lines.windows(2) {
            let (end, start) = (pair[0][14], pair[1][13]);
            assert!(start == end || start == end + 1, "tokens are used one after the other");
        }
        assert!(as_table(&usage).contains("processor  33.0 s"), "{}", as_table(&usage));
    }
}
