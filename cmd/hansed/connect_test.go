package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"testing"
)

// What is said on standard input is answered on standard output, several times on one connection, and the end of either ends both.
func TestConnect(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "hansed.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "hello "+r.URL.Path) })}
	go func() { _ = srv.Serve(l) }()
	defer srv.Close()

	inR, inW := io.Pipe()
	outR, outW := io.Pipe()
	done := make(chan error, 1)
	go func() { done <- connect(socket, inR, outW); outW.Close() }()
	answers := bufio.NewReader(outR)
	for i := range 3 {
		req, _ := http.NewRequest("GET", fmt.Sprintf("http://hansed/%d", i), nil)
		if err := req.Write(inW); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(answers, req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		if string(body) != fmt.Sprintf("hello /%d", i) {
			t.Errorf("answer %q", body)
		}
	}
	inW.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := connect(filepath.Join(t.TempDir(), "none"), inR, io.Discard); err == nil {
		t.Error("no socket, and no error")
	}
}
