//! Plain tables and amounts for people: columns two spaces apart, as wide as their widest cell.

/// Micro-tokens that somebody has or gets, as tokens with two digits behind the point: never more than there is.
pub fn tokens(micro: u64) -> String {
    cents(micro / 10_000)
}

/// Micro-tokens that somebody has to pay: never less than it is.
pub fn cost(micro: u64) -> String {
    cents(micro.div_ceil(10_000))
}

/// Micro-tokens that something costs a second, as tokens with four digits behind the point: never less than it is.
pub fn rate(micro_per_s: u64) -> String {
    let parts = micro_per_s.div_ceil(100);
    format!("{}.{:04}", parts / 10_000, parts % 10_000)
}

fn cents(cents: u64) -> String {
    format!("{}.{:02}", cents / 100, cents % 100)
}

/// Seconds as a short span: `59s`, `12m`, `3h`, `2d`; `ever` for the node's word for no end.
pub fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        u64::MAX => "ever".to_owned(),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// A table with its head; nothing behind the last cell of a line.
pub fn render(head: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([head[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded = cells.zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    let mut out = line(&mut head.iter().copied());
    rows.iter().for_each(|row| out.push_str(&line(&mut row.iter().map(String::as_str))));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_up_columns() {
        let rows = [vec!["1".to_owned(), "long one".to_owned(), "x".to_owned()]];
        assert_eq!(render(&["NODE", "NAME", ""], &rows), "NODE  NAME\n1     long one  x\n");
    }

    #[test]
    fn amounts_and_spans() {
        assert_eq!([0, 1, 10_000, 1_239_999].map(tokens), ["0.00", "0.00", "0.01", "1.23"]);
        assert_eq!([0, 1, 10_000, 1_230_001].map(cost), ["0.00", "0.01", "0.01", "1.24"]);
        assert_eq!(
            [0, 1, 849_900, 12_000_001].map(rate),
            ["0.0000", "0.0001", "0.8499", "12.0001"]
        );
        assert_eq!([5, 119, 600, 7200, 200_000].map(span), ["5s", "119s", "10m", "2h", "2d"]);
        assert_eq!(span(u64::MAX), "ever");
    }
}
