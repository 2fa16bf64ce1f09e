package main

import (
	"io"
	"strings"
	"testing"
)

// TestCopyRefusesWhatCannotBeMeant: before anything is opened.
func TestCopyRefusesWhatCannotBeMeant(t *testing.T) {
	good := func() (*Config, *Config) {
		old, next := &Config{Cluster: "west", TrustDomain: "west.demo", DataDir: "/var/lib/hanse"}, &Config{Cluster: "west", TrustDomain: "west.demo", DataDir: "/var/lib/hanse"}
		next.Etcd.Endpoints = []string{"https://127.0.0.1:1"}
		return old, next
	}
	for want, change := range map[string]func(old, next *Config){
		"etcd.endpoints: missing":                 func(_, next *Config) { next.Etcd.Endpoints = nil },
		"one cluster's state is not another's":    func(_, next *Config) { next.Cluster = "east" },
		"the keys of roots are there, and stay":   func(_, next *Config) { next.DataDir = "/srv" },
		"cluster \"west\" with trust domain east": func(_, next *Config) { next.TrustDomain = "east.demo" },
	} {
		old, next := good()
		change(old, next)
		if err := copyState(t.Context(), old, next, io.Discard); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}
