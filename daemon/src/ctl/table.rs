//! Tables of text: columns as wide as their widest cell. Pure.

/// How a column's cells stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Align {
    /// Texts.
    Left,
    /// Numbers.
    Right,
}

/// Renders rows of cells under their heads; no line ends in blanks. A cell beyond the heads is left out.
pub(super) fn render(heads: &[(&str, Align)], rows: &[Vec<String>]) -> String {
    let width = |column: usize, head: &str| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([head.chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = heads.iter().enumerate().map(|(column, (head, _))| width(column, head)).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut line = String::new();
        for ((cell, width), (_, align)) in cells.zip(&widths).zip(heads) {
            match align {
                Align::Left => line.push_str(&format!("{cell:<width$}  ")),
                Align::Right => line.push_str(&format!("{cell:>width$}  ")),
            }
        }
        format!("{}\n", line.trim_end())
    };
    let mut text = line(&mut heads.iter().map(|(head, _)| *head));
    for row in rows {
        text.push_str(&line(&mut row.iter().map(String::as_str)));
    }
    text
}

/// Renders pairs of a name and a value, the values below each other.
pub(super) fn pairs(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    pairs.iter().map(|(name, value)| format!("{name:>width$}: {value}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_lines_end_without_blanks() {
        let rows =
            [vec!["a".to_owned(), "1".to_owned(), String::new()], vec!["ünger".into(), "100".into(), "x".into()]];
        assert_eq!(
            render(&[("NAME", Align::Left), ("N", Align::Right), ("E", Align::Left)], &rows),
            "NAME     N  E\na        1\nünger  100  x\n"
        );
    }

    #[test]
    fn pairs_line_up_at_the_colon() {
        assert_eq!(pairs(&[("a", "1".into()), ("long", "2".into())]), "   a: 1\nlong: 2\n");
    }
}
