package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

func TestDNSConfig(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	load := func(more string) (*Config, error) { return LoadConfig(write(t, sample+more), "", "") }
	for _, c := range []struct{ more, listen, addresses string }{
		{"", "[]", "none none"},
		{"dns: {listen: ['127.0.0.1:5353']}\n", "[127.0.0.1:5353]", "none none"},
		{"capture: {enabled: true}\n", "[]", "240.0.0.0/4 fd68:616e:7365::/64"},
		{"capture: {enabled: true, dns: true, dnsPort: 5300}\n", "[127.0.0.1:5300 [::1]:5300]", "240.0.0.0/4 fd68:616e:7365::/64"},
		{"capture: {enabled: true, dns: true}\ndns: {addresses: 198.18.0.0/15, addresses6: none}\n", "[127.0.0.1:15053 [::1]:15053]", "198.18.0.0/15 none"},
	} {
		cfg, err := load(c.more)
		if err != nil {
			t.Errorf("%s: %v", c.more, err)
			continue
		}
		if got := fmt.Sprint(cfg.DNS.Listen); got != c.listen {
			t.Errorf("%s: listen %s", c.more, got)
		}
		if got := cfg.DNS.Addresses + " " + cfg.DNS.Addresses6; got != c.addresses {
			t.Errorf("%s: addresses %s", c.more, got)
		}
		if r := cfg.rules(nil, false); cfg.Capture.DNS && strings.TrimSuffix(strings.Join(strings.Fields(cfg.DNS.Addresses+" "+cfg.DNS.Addresses6), " "), " none") != strings.Trim(fmt.Sprint(r.Always), "[]") {
			t.Errorf("%s: the rules always capture %s", c.more, r.Always)
		}
	}
	_, err := load("capture: {enabled: true, dns: true}\n" +
		"dns: {listen: ['0.0.0.0:53', '127.0.0.1:53', x], upstreams: [a, '127.0.0.1:53'], addresses: 10.0.0.0/30, timeout: 1h, shortNames: maybe}\n")
	for _, want := range []string{`dns.listen[0]: "0.0.0.0:53" is not a loopback`, `dns.listen[2]: "x" is not ip:port`, "dns.listen: capture.dns leads", `dns.upstreams[0]: "a" is neither`,
		"dns.upstreams[1]: 127.0.0.1:53 is this resolver itself", "dns.addresses: 10.0.0.0/30 is not a range", "dns.timeout: 1h0m0s", `dns.shortNames: "maybe"`} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s is not in %v", want, err)
		}
	}
}

func TestDNSUpstreamsAndFixedNames(t *testing.T) {
	conf := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(conf, []byte("# made by hand\nsearch example.com\nnameserver 127.0.0.1\nnameserver 192.0.2.53\noptions ndots:5\nnameserver\nnameserver x\nnameserver 2001:db8::53\nnameserver 192.0.2.54\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := LoadConfig(write(t, sample+"dns: {listen: ['127.0.0.1:53'], resolvConf: "+conf+"}\n"), "", "")
	if err != nil {
		t.Fatal(err)
	}
	up, err := cfg.upstreams()
	if got := fmt.Sprint(up); err != nil || got != "[192.0.2.53:53 [2001:db8::53]:53]" {
		t.Errorf("upstreams %s, %v: want those of the file without ourselves, at most three in all", got, err)
	}
	cfg.Listeners = []Local{{Listen: "127.0.1.1:8080", To: "payments.shop:8080"}, {Listen: "127.0.1.2:5432", To: "DB:5432"}, {Listen: "127.0.0.1:9001", To: "other.shop:80"}, {Listen: "127.0.1.3:80", To: "plain.shop"}}
	cfg.Namespace = "shop"
	if got := fmt.Sprint(cfg.fixed()); got != "map[db.shop.svc.clusterset.local:[127.0.1.2] payments.shop.svc.clusterset.local:[127.0.1.1]]" {
		t.Errorf("fixed %s", got)
	}
	p := &process{cfg: &Config{DNS: DNS{}}}
	if s, err := p.resolver(prometheus.NewRegistry()); s != nil || err != nil {
		t.Errorf("a resolver that nobody asked for: %v", err)
	}
}
