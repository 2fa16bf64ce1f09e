package e2e

import (
	"context"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
)

// TestExternalEtcd runs one cluster over an etcd that is not its own process, joins it with one that embeds, and reads with the stock
// client what it keeps there.
func TestExternalEtcd(t *testing.T) {
	l := newLab(t, shortTimers, "west", "east")
	west := l.cluster("west")
	at := url.URL{Scheme: "http", Host: strings.TrimSuffix(west.GatewayIP, "9") + "5:2379"}
	peer := url.URL{Scheme: "http", Host: strings.TrimSuffix(west.GatewayIP, "9") + "5:2380"}
	cfg := embed.NewConfig()
	cfg.Dir, cfg.LogLevel, cfg.UnsafeNoFsync = filepath.Join(l.dir, "etcd"), "error", true
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{at}, []url.URL{at}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	server, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Close)
	select {
	case <-server.Server.ReadyNotify():
	case <-time.After(30 * time.Second):
		t.Fatal("etcd is not ready within 30s")
	}

	l.args["west/hansed"] = []string{"--etcd-endpoints", at.String()}
	l.up()
	if n := len(l.state("east")); n != 4 {
		t.Errorf("east sees %d endpoints, want 4", n)
	}
	if n := len(l.state("west")); n != 4 {
		t.Errorf("west sees %d endpoints, want 4", n)
	}

	client, err := clientv3.New(clientv3.Config{Endpoints: []string{at.String()}, DialTimeout: 5 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, prefix := range []string{"exports/v1/", "imports/"} {
		r, err := client.Get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil || r.Count == 0 {
			t.Errorf("the stock client finds %d keys under %s: %v", r.Count, prefix, err)
		}
	}

	before := l.state("west")
	l.kill("west/hansed", "east/hansed")
	l.start("west/hansed")
	l.ready("west/hansed", west.Admin)
	if after := l.state("west"); len(after) != len(before) {
		t.Errorf("after a restart with its peer absent west sees %d endpoints, before %d", len(after), len(before))
	}
}
