package main

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// report is what is printed, and written into the documentation.
type report struct {
	text    bytes.Buffer
	missing []string
}

func (r *report) head(b *bench) {
	fmt.Fprintf(&r.text, "%s; %d × %s, %s, Linux %s; load generator and servers on the same machine, load average %s before\n",
		time.Now().UTC().Format("2006-01-02"), runtime.NumCPU(), cpuModel(), runtime.Version(), firstLine("/proc/sys/kernel/osrelease"), firstLine("/proc/loadavg"))
	fmt.Fprintf(&r.text, "medians of %d rounds of %s; ratios are Hanse's CPU to that product's, within a round\n", b.rounds, b.length)
	for _, p := range b.products {
		fmt.Fprintf(&r.text, "%s: %s\n", p.name, p.version)
	}
	for _, m := range r.missing {
		fmt.Fprintf(&r.text, "%s is not installed here: it was left out\n", m)
	}
}

func (r *report) foot(took time.Duration) {
	fmt.Fprintf(&r.text, "\nThe whole run took %s.\n", took.Round(time.Second))
}

// table adds rows, whose cells are separated by tabs.
func (r *report) table(title string, rows []string) {
	r.text.WriteByte('\n')
	w := tabwriter.NewWriter(&r.text, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, title)
	for _, row := range rows {
		fmt.Fprintln(w, row)
	}
	_ = w.Flush()
}

// ratio is Hanse's CPU to a product's, round by round.
func ratio(by map[string][]result, name string) string {
	mine, theirs := by["hanse"], by[name]
	if name == "hanse" || len(mine) != len(theirs) {
		return "-"
	}
	var ratios []float64
	for i := range theirs {
		if theirs[i].CPU > 0 {
			ratios = append(ratios, mine[i].CPU/theirs[i].CPU)
		}
	}
	return fmt.Sprintf("%.2f", median(ratios))
}

func of(rs []result, f func(result) float64) float64 {
	var vs []float64
	for _, r := range rs {
		vs = append(vs, f(r))
	}
	return median(vs)
}

func cpuOf(r result) float64       { return r.CPU }
func perSecondOf(r result) float64 { return r.PerSecond }
func p50Of(r result) float64       { return r.P50.Seconds() * 1000 }
func p99Of(r result) float64       { return r.P99.Seconds() * 1000 }

func median(vs []float64) float64 {
	vs = slices.Sorted(slices.Values(vs))
	if len(vs) == 0 {
		return 0
	}
	if n := len(vs); n%2 == 0 {
		return (vs[n/2-1] + vs[n/2]) / 2
	}
	return vs[len(vs)/2]
}

const (
	beginMark = "<!-- bench: begin; `make bench-proxy` writes this -->"
	endMark   = "<!-- bench: end -->"
)

// write puts the report between the markers of a file.
func (r *report) write(path string) error {
	old, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	next, err := between(string(old), r.text.String())
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return os.WriteFile(path, []byte(next), 0o644)
}

func between(page, text string) (string, error) {
	from, to := strings.Index(page, beginMark), strings.Index(page, endMark)
	if from < 0 || to < from {
		return "", fmt.Errorf("no line %q before a line %q", beginMark, endMark)
	}
	return page[:from+len(beginMark)] + "\n```\n" + text + "```\n" + page[to:], nil
}

func cpuModel() string {
	b, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(b)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}

func firstLine(path string) string {
	b, _ := os.ReadFile(path)
	line, _, _ := strings.Cut(string(b), "\n")
	if f := strings.Fields(line); path == "/proc/loadavg" && len(f) > 0 {
		return f[0]
	}
	return line
}
