package main

import (
	"bufio"
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
	if loads, err := parseLoads("1,16", "100"); err != nil || len(loads) != 2 || loads[1] != (load{16, 100}) {
		t.Error(loads, err)
	}
	if _, err := parseLoads("x", "100"); err == nil {
		t.Error("nonsense was accepted")
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
