package main

import (
	"bufio"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestArithmetic(t *testing.T) {
	if m := median([]float64{3, 1, 2}); m != 2 {
		t.Error(m)
	}
	if m := median([]float64{4, 1, 2, 3}); m != 2.5 {
		t.Error(m)
	}
	if d := statTime("1 (a ) b) S 2 3 4 5 6 7 8 9 10 11 150 50 0 0 20"); d != 2*time.Second {
		t.Error(d)
	}
	if ns, err := numbers("--conns", "1,16"); err != nil || !slices.Equal(ns, []int{1, 16}) {
		t.Error(ns, err)
	}
	if _, err := numbers("--conns", "x"); err == nil {
		t.Error("nonsense was accepted")
	}
	if parts, err := choose("grpc,bytes"); err != nil || len(parts) != 2 || parts[1].name != "bytes" {
		t.Error(parts, err)
	}
	if _, err := choose("sleep"); err == nil {
		t.Error("nonsense was accepted")
	}
	by := map[string][]result{"hanse": {{CPU: 2}, {CPU: 3}, {CPU: 10}}, "nginx": {{CPU: 4}, {CPU: 3}, {CPU: 5}}}
	if r := ratio(by, "nginx"); r != "1.00" {
		t.Error(r)
	}
	page := "before\n" + beginMark + "\nold\n" + endMark + "\nafter"
	if got, err := between(page, "new\n"); err != nil || got != "before\n"+beginMark+"\n```\nnew\n```\n"+endMark+"\nafter" {
		t.Error(got, err)
	}
	if _, err := between("nothing", "new"); err == nil {
		t.Error("a page without markers was accepted")
	}
}

func TestWrongAnswersAreNoticed(t *testing.T) {
	const head = "HTTP/1.1 200 OK\r\nX-Id: 1-2\r\nContent-Length: 2\r\n\r\n"
	for answer, ok := range map[string]bool{
		head + "hi": true,
		strings.Replace(head, "1-2", "1-3", 1) + "hi":              false,
		strings.Replace(head, "200 OK", "503 No", 1) + "hi":        false,
		strings.Replace(head, "2\r\n\r\n", "3\r\n\r\n", 1) + "hi!": false,
		head + "h": false,
	} {
		if err := check(bufio.NewReader(strings.NewReader(answer)), "1-2", 2); (err == nil) != ok {
			t.Errorf("%q: %v", answer, err)
		}
	}
}

// The backends answer as the loads check it.
func TestBackends(t *testing.T) {
	b, err := newBackends()
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	p := &product{name: "none", http: b.http, grpc: b.grpc, tcp: b.tcp, host: "a"}
	for name, f := range map[string]func() error{"once": func() error { return once(p) }, "tcp": func() error { return onceTCP(p) }, "grpc": func() error { return onceGRPC(t.Context(), p) },
		"download": func() error { return download(p) }, "upload": func() error { return upload(p) }} {
		if err := f(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What gateways are measured with works without one, and wrong bytes and another's certificate are noticed.
func TestSealed(t *testing.T) {
	dir, other := filepath.Join(t.TempDir(), "a"), filepath.Join(t.TempDir(), "b")
	for _, d := range []string{dir, other} {
		if err := certificates(d); err != nil {
			t.Fatal(err)
		}
	}
	ln, err := openSealed(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for d, ok := range map[string]bool{dir: true, other: false} {
		roots, err := os.ReadFile(filepath.Join(d, "ca.pem"))
		if err != nil {
			t.Fatal(err)
		}
		for _, verb := range []byte("du") {
			if err := throughGateway(&product{tcp: ln.Addr().String(), roots: roots}, verb, 1<<20); (err == nil) != ok {
				t.Errorf("%c with the roots of %s: %v", verb, filepath.Base(d), err)
			}
		}
	}
}
