package main

import (
	"bufio"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"sigs.k8s.io/yaml"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
)

// print writes v as c.output says, json or yaml.
func (c *cli) print(v any) error {
	if c.output == "yaml" {
		b, err := yaml.Marshal(v)
		if err != nil {
			return err
		}
		_, err = c.out.Write(b)
		return err
	}
	e := json.NewEncoder(c.out)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// structured says that -o asks for data, not for a table.
func (c *cli) structured() bool { return c.output == "json" || c.output == "yaml" }

// palette colours text if on.
type palette struct{ on bool }

func (p palette) paint(code, s string) string {
	if !p.on || s == "" {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

func (p palette) red(s string) string    { return p.paint("31", s) }
func (p palette) green(s string) string  { return p.paint("32", s) }
func (p palette) yellow(s string) string { return p.paint("33", s) }
func (p palette) bold(s string) string   { return p.paint("1", s) }

func (c *cli) palette() palette { return palette{on: c.outTTY && c.colours()} }

// cell is a text and what it means: good, bad, doubtful or nothing.
type cell struct {
	text string
	mood mood
}

type mood int

const (
	neutral mood = iota
	good
	doubtful
	bad
)

func plain(s string) cell { return cell{text: s} }

func number[T ~int | ~int64 | ~uint64](n T) cell { return plain(fmt.Sprint(n)) }

func (p palette) mood(m mood, s string) string {
	switch m {
	case good:
		return p.green(s)
	case doubtful:
		return p.yellow(s)
	case bad:
		return p.red(s)
	}
	return s
}

// table is aligned in columns two spaces apart. Its last column is never padded.
type table struct {
	head []string
	rows [][]cell
}

func newTable(head ...string) *table { return &table{head: head} }

func (t *table) row(cells ...cell) { t.rows = append(t.rows, cells) }

func (c *cli) table(t *table) {
	p := c.palette()
	var all [][]cell
	if len(t.head) > 0 {
		head := make([]cell, len(t.head))
		for i, h := range t.head {
			head[i] = plain(h)
		}
		all = append(all, head)
	}
	all = append(all, t.rows...)
	var widths []int
	for _, r := range all {
		for i, x := range r {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(x.text))
		}
	}
	for n, r := range all {
		var line strings.Builder
		for i, x := range r {
			s := p.mood(x.mood, x.text)
			if n == 0 && len(t.head) > 0 {
				s = p.bold(x.text)
			}
			line.WriteString(s)
			if i < len(r)-1 {
				line.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(x.text)+2))
			}
		}
		fmt.Fprintln(c.out, strings.TrimRight(line.String(), " "))
	}
}

// checks prints facts as `✓ name  detail`, each failed one with its remedy.
func (c *cli) checks(w io.Writer, p palette, l []admin.Check) {
	width := 0
	for _, k := range l {
		width = max(width, utf8.RuneCountInString(k.Name))
	}
	for _, k := range l {
		c.check(w, p, k, width)
	}
}

func (c *cli) check(w io.Writer, p palette, k admin.Check, width int) {
	mark, m := "✓", good
	switch {
	case !k.OK && k.Warn:
		mark, m = "!", doubtful
	case !k.OK:
		mark, m = "✗", bad
	}
	line := fmt.Sprintf("  %s %s", p.mood(m, mark), k.Name)
	if k.Detail != "" {
		line += strings.Repeat(" ", max(0, width-utf8.RuneCountInString(k.Name))) + "  " + k.Detail
	}
	fmt.Fprintln(w, line)
	if !k.OK && k.Remedy != "" {
		fmt.Fprintf(w, "    remedy: %s\n", k.Remedy)
	}
}

func (c *cli) printFaults(faults []admin.Fault) {
	for _, f := range faults {
		fmt.Fprintf(c.err, "  %s\n", faultText(f))
	}
}

// faultText is "file:line: object: field: "value": reason" without what is unknown.
func faultText(f admin.Fault) string {
	var parts []string
	switch {
	case f.File != "" && f.Line > 0:
		parts = append(parts, fmt.Sprintf("%s:%d", f.File, f.Line))
	case f.File != "":
		parts = append(parts, f.File)
	case f.Line > 0:
		parts = append(parts, fmt.Sprintf("line %d", f.Line))
	}
	for _, s := range []string{f.Object, f.Field} {
		if s != "" {
			parts = append(parts, s)
		}
	}
	if f.Value != "" {
		parts = append(parts, fmt.Sprintf("%q", f.Value))
	}
	return strings.Join(append(parts, f.Reason), ": ")
}

// age writes seconds as a person says them: 47s, 3m20s, 41m, 2h, 6d.
func age(seconds float64) string {
	s := int64(math.Max(0, math.Round(seconds)))
	switch {
	case s < 120:
		return fmt.Sprintf("%ds", s)
	case s < 600 && s%60 != 0:
		return fmt.Sprintf("%dm%ds", s/60, s%60)
	case s < 2*3600:
		return fmt.Sprintf("%dm", s/60)
	case s < 48*3600:
		return fmt.Sprintf("%dh", s/3600)
	}
	return fmt.Sprintf("%dd", s/86400)
}

// ageOr is age, or "-" for what is not known.
func ageOr(seconds *float64) string {
	if seconds == nil {
		return "-"
	}
	return age(*seconds)
}

// span writes a measured duration in seconds: 1.3ms, 0.9s.
func span(seconds float64) string {
	if seconds < 0.1 {
		return millis(seconds * 1000)
	}
	return fmt.Sprintf("%.1fs", seconds)
}

func millis(ms float64) string {
	if ms < 10 {
		return fmt.Sprintf("%.1fms", ms)
	}
	return fmt.Sprintf("%.0fms", ms)
}

// latency is of calls; 0 is of none.
func latency(ms float64) string {
	if ms == 0 {
		return "-"
	}
	return millis(ms)
}

// thousands writes 18204 as 18,204.
func thousands(n uint64) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// counted is "1 service", "14 services".
func counted[T ~int | ~uint64](n T, one string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %ss", n, one)
}

// readLine reads one line, at most 64 KiB, without its end.
func readLine(r io.Reader) (string, error) {
	line, err := bufio.NewReaderSize(io.LimitReader(r, 64<<10), 64<<10).ReadString('\n')
	if err != nil && !(errors.Is(err, io.EOF) && line != "") {
		return "", err
	}
	return strings.TrimRight(line, "\r\n"), nil
}

func asUsage(err error, u **usageError) bool { return errors.As(err, u) }

// bundleFromPEM makes a bundle of certificates; whatever else is in b is a mistake.
func bundleFromPEM(td spiffeid.TrustDomain, b []byte) (*spiffebundle.Bundle, error) {
	bundle := spiffebundle.New(td)
	for rest := b; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("a bundle holds certificates, not %s", strings.ToLower(block.Type))
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		bundle.AddX509Authority(cert)
	}
	if len(bundle.X509Authorities()) == 0 {
		return nil, errors.New("no certificate in it: a bundle is PEM or SPIFFE's JSON")
	}
	return bundle, nil
}
