package etcd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/client/pkg/v3/fileutil"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3rpc"
	"go.etcd.io/etcd/server/v3/proxy/grpcproxy/adapter"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

const (
	defaultQuota   = 2 << 30 // bytes
	defaultHistory = 15 * time.Minute
	compactEvery   = time.Minute
	startTimeout   = 30 * time.Second
	lockTimeout    = 3 * time.Second // for a process before this one to end; startTimeout begins when it has
	txnOps         = MaxOps + 8      // a batch, its checkpoint, its fence
)

// EmbeddedConfig describes one etcd inside this process.
type EmbeddedConfig struct {
	Dir        string        // data directory, made with mode 0700
	Name       string        // member name, for logs
	QuotaBytes int64         // of the database; 0 is 2 GiB
	History    time.Duration // revisions younger than this are kept where the quota allows; 0 is 15 min
	Log        *slog.Logger
}

// Embedded is a running etcd without any listening socket: it is reached only through its methods.
type Embedded struct {
	cfg    EmbeddedConfig
	etcd   *embed.Etcd
	kv     pb.KVServer
	watch  pb.WatchServer
	client *clientv3.Client
	stop   context.CancelFunc // of the compaction loop
	done   chan struct{}      // closed when the compaction loop has ended
	fail   *failure
	lock   *fileutil.LockedFile // on lockName

	closing sync.Once
}

// failure is the first fatal error of a server.
type failure struct {
	once sync.Once
	c    chan struct{}
	err  error // read after c is closed
}

func (f *failure) set(err error) {
	f.once.Do(func() {
		f.err = err
		close(f.c)
	})
}

// DataError is a data directory that etcd could not use. Nothing in it was overwritten.
type DataError struct {
	Dir string
	Err error
}

func (e *DataError) Error() string { return fmt.Sprintf("etcd data in %s: %v", e.Dir, e.Err) }
func (e *DataError) Unwrap() error { return e.Err }

// Hint says what a person can do.
func (e *DataError) Hint() string {
	return fmt.Sprintf("nothing was overwritten; if the disk is full, free space; else move %s away and restore a backup of it, or start with an empty directory: peers send their exports again", e.Dir)
}

// StartEmbedded starts an etcd and returns when it can be written to. A data directory that cannot be read is a *DataError.
func StartEmbedded(ctx context.Context, cfg EmbeddedConfig) (_ *Embedded, err error) {
	if cfg.QuotaBytes == 0 {
		cfg.QuotaBytes = defaultQuota
	}
	if cfg.History == 0 {
		cfg.History = defaultHistory
	}
	cfg.Log = orDiscard(cfg.Log).With("etcd", cfg.Name)
	lock, err := lockDir(cfg.Dir)
	if err != nil {
		return nil, &DataError{cfg.Dir, err}
	}
	defer func() {
		if err != nil {
			_ = lock.Close()
		}
	}()
	if err := checkDir(cfg.Dir, cfg.Log); err != nil {
		return nil, &DataError{cfg.Dir, err}
	}
	e := &Embedded{cfg: cfg, done: make(chan struct{}), fail: &failure{c: make(chan struct{})}, lock: lock}
	started := make(chan error, 1)
	go func() { // etcd panics or exits on what it cannot read; here both become an error
		defer func() {
			if r := recover(); r != nil {
				started <- fmt.Errorf("etcd cannot read it: %v", r)
			}
		}()
		var err error
		e.etcd, err = embed.StartEtcd(e.settings())
		started <- err
	}()
	timeout := time.NewTimer(startTimeout)
	defer timeout.Stop()
	select {
	case err := <-started:
		select {
		case <-e.fail.c: // says more than what broke after it
			err = e.fail.err
		default:
		}
		if err != nil {
			return nil, &DataError{cfg.Dir, err}
		}
	case <-e.fail.c:
		return nil, &DataError{cfg.Dir, e.fail.err}
	case <-timeout.C:
		return nil, &DataError{cfg.Dir, fmt.Errorf("not started within %s: the disk or this machine is too slow, or another program than hansed, such as etcdutl, has it open", startTimeout)}
	}
	select {
	case <-e.etcd.Server.ReadyNotify():
	case <-e.fail.c:
		return nil, &DataError{cfg.Dir, e.fail.err}
	case <-ctx.Done():
		e.etcd.Close()
		return nil, fmt.Errorf("start etcd in %s: %w", cfg.Dir, ctx.Err())
	}
	if err := os.WriteFile(filepath.Join(cfg.Dir, readyFile), nil, 0o600); err != nil {
		e.etcd.Close()
		return nil, &DataError{cfg.Dir, err}
	}
	e.kv, e.watch = v3rpc.NewQuotaKVServer(e.etcd.Server), v3rpc.NewWatchServer(e.etcd.Server)
	e.client = v3client.New(e.etcd.Server)
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	e.stop = stop
	go func() {
		defer close(e.done)
		e.compactLoop(run)
	}()
	return e, nil
}

// readyFile is written once a data directory has been served from. Without it a first start did not finish, and may be repeated.
const readyFile = "hanse-etcd-ready"

// lockName is locked for as long as a process has the directory open: before anything in it is looked at, and before etcd takes locks of its own.
const lockName = "hanse-etcd-lock"

// lockDir makes the directory and locks it.
func lockDir(dir string) (*fileutil.LockedFile, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return lockFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE, "directory "+dir)
}

// checkDir the log of a data directory, or refuses it. Of one of which a part is gone etcd would make a new start, and bury the rest.
func checkDir(dir string, log *slog.Logger) error {
	records := filepath.Join(dir, "member", "wal")
	switch _, err := os.Stat(filepath.Join(dir, readyFile)); {
	case errors.Is(err, fs.ErrNotExist):
		segments, _, err := logFiles(records)
		if errors.Is(err, fs.ErrNotExist) || err == nil && len(segments) == 0 {
			return nil
		}
		return mendLog(records, 0, log)
	case err != nil:
		return err
	}
	database := filepath.Join(dir, "member", "snap", "db")
	for _, part := range []string{records, database} {
		if _, err := os.Stat(part); err != nil {
			return fmt.Errorf("incomplete: %w", err)
		}
	}
	applied, err := checkDatabase(database)
	if err != nil {
		return err
	}
	if err := mendLog(records, applied, log); err != nil {
		return err
	}
	copies, err := filepath.Glob(filepath.Join(dir, "member", "snap", "db.tmp.*")) // of a compaction that did not end; etcd leaves them
	for _, path := range copies {
		err = errors.Join(err, os.Remove(path))
	}
	return err
}

// checkDatabase opens the database as etcd will, here where its panics can be caught: etcd opens it in a goroutine of its own. It returns the
// index of the last entry of the log that is in it.
func checkDatabase(path string) (applied uint64, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // a file cut short faults where it is mapped
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("database %s is damaged: %v", path, r)
		}
	}()
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, PreLoadFreelist: true, Timeout: lockTimeout})
	if errors.Is(err, berrors.ErrTimeout) {
		return 0, fmt.Errorf("database %s is in use by another process", path)
	}
	if err != nil {
		return 0, fmt.Errorf("database %s is damaged: %w", path, err)
	}
	defer db.Close()
	err = db.View(func(tx *bbolt.Tx) error {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		if info.Size() < tx.Size() {
			return fmt.Errorf("database %s is damaged: %d bytes of %d", path, info.Size(), tx.Size())
		}
		if meta := tx.Bucket([]byte("meta")); meta != nil {
			if v := meta.Get([]byte("consistent_index")); len(v) == 8 {
				applied = binary.BigEndian.Uint64(v)
			}
		}
		return tx.ForEach(func([]byte, *bbolt.Bucket) error { return nil }) // reads the root
	})
	return applied, err
}

func (e *Embedded) settings() *embed.Config {
	c := embed.NewConfig()
	c.Name, c.Dir = e.cfg.Name, e.cfg.Dir
	c.ListenPeerUrls, c.ListenClientUrls, c.AdvertiseClientUrls = nil, nil, nil // no socket at all
	c.InitialCluster = c.InitialClusterFromName(c.Name)
	c.EnableGRPCGateway = false
	c.QuotaBackendBytes = e.cfg.QuotaBytes
	c.MaxTxnOps = txnOps
	c.MaxRequestBytes = 2 << 20
	c.SnapshotCount, c.SnapshotCatchUpEntries = 25, 5 // entries of up to MaxBytes kept in memory; there is no follower to catch up
	c.BackendBatchInterval = time.Second              // of commits to the database; the log is written at once, and replayed after a crash
	c.BackendBatchLimit = 500                         // operations that may wait for that, in memory
	c.TickMs, c.ElectionMs = 50, 250                  // nobody to elect against; the first election is what a start waits for
	c.WatchProgressNotifyInterval = 10 * time.Second
	c.AutoCompactionMode, c.AutoCompactionRetention = embed.CompactorModePeriodic, "0" // compactLoop does it
	c.ZapLoggerBuilder = embed.NewZapLoggerBuilder(newZap(e.cfg.Log, e.fail))
	return c
}

// Client returns a stock client that calls the server directly. It must not be closed.
func (e *Embedded) Client() *clientv3.Client { return e.client }

// Store returns the server as a Store.
func (e *Embedded) Store() Store {
	return &wire{kv: directKV{e.kv, adapter.KvServerToKvClient(e.kv)}, watch: adapter.WatchServerToWatchClient(e.watch)}
}

// Servers returns the server's own API, for a Guard.
func (e *Embedded) Servers() (pb.KVServer, pb.WatchServer) { return e.kv, e.watch }

// Wait blocks until ctx ends (nil) or the server cannot go on, as when its disk is full (*DataError).
func (e *Embedded) Wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-e.fail.c:
		return &DataError{e.cfg.Dir, e.fail.err}
	}
}

// Close stops the server and returns when its files are closed. Once is enough.
func (e *Embedded) Close() error {
	e.closing.Do(func() {
		defer e.lock.Close() // etcd has locks of its own where it could not be closed
		e.stop()
		<-e.done
		_ = e.client.Close() // says only that its context ended
		select {
		case <-e.fail.c: // it no longer answers its own Close
		default:
			closed := make(chan struct{})
			go func() {
				defer close(closed)
				e.etcd.Close()
			}()
			select {
			case <-closed:
			case <-e.fail.c: // in its last commit
			}
		}
	})
	select {
	case <-e.fail.c:
		return &DataError{e.cfg.Dir, e.fail.err}
	default:
		return nil
	}
}

// Sizes returns the bytes of the database file, and of them those in use.
func (e *Embedded) Sizes() (file, inUse int64) {
	b := e.etcd.Server.Backend()
	return b.Size(), b.SizeInUse()
}

// mark is the revision of a moment.
type mark struct {
	at       time.Time
	revision int64
}

// compactLoop forgets history each minute, and gives space back when the quota gets near.
func (e *Embedded) compactLoop(ctx context.Context) {
	t := time.NewTicker(compactEvery)
	defer t.Stop()
	var marks []mark
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-t.C:
			marks = append(marks, mark{now, e.etcd.Server.KV().Rev()})
			var upTo int64
			upTo, marks = compaction(marks, now, e.history())
			if err := e.compact(ctx, upTo); err != nil && ctx.Err() == nil {
				e.cfg.Log.Warn("compaction did not work", "revision", upTo, "error", err)
			}
		}
	}
}

// compaction returns the revision up to which history may go (0: none) and the marks still needed.
func compaction(marks []mark, now time.Time, history time.Duration) (int64, []mark) {
	var upTo int64
	for len(marks) > 0 && now.Sub(marks[0].at) >= history {
		upTo, marks = marks[0].revision, marks[1:]
	}
	return upTo, marks
}

// history is shorter when the database is more than half full.
func (e *Embedded) history() time.Duration {
	if _, inUse := e.Sizes(); inUse > e.cfg.QuotaBytes/2 {
		return min(e.cfg.History, compactEvery)
	}
	return e.cfg.History
}

// Compact forgets history before a revision, and, if the file is near the quota and mostly empty, gives its space back.
func (e *Embedded) compact(ctx context.Context, upTo int64) error {
	if upTo > 1 {
		_, err := e.kv.Compact(ctx, &pb.CompactionRequest{Revision: upTo, Physical: true})
		if err != nil && !errors.Is(rpcError(err), ErrCompacted) {
			return err
		}
	}
	e.etcd.Server.Backend().ForceCommit() // else the sizes are those before the compaction
	file, inUse := e.Sizes()
	if file < e.cfg.QuotaBytes/10*8 || inUse > e.cfg.QuotaBytes/10*7 {
		return nil
	}
	if err := e.etcd.Server.Backend().Defrag(); err != nil { // the in-process client has no Defragment: it panics
		return fmt.Errorf("defragment: %w", err)
	}
	alarms, err := e.client.AlarmList(ctx)
	if err != nil {
		return fmt.Errorf("read alarms: %w", err)
	}
	for _, a := range alarms.Alarms { // deleting alone does not clear NOSPACE
		if a.Alarm == pb.AlarmType_NOSPACE {
			if _, err := e.client.AlarmDisarm(ctx, (*clientv3.AlarmMember)(a)); err != nil {
				return fmt.Errorf("disarm alarm: %w", err)
			}
		}
	}
	return nil
}

// newZap sends etcd's log to an slog one level lower, since its Info is its own affairs; fatal errors go to f instead of ending the process.
func newZap(log *slog.Logger, f *failure) *zap.Logger {
	log = orDiscard(log)
	var opts []zap.Option
	if f != nil {
		opts = append(opts, zap.WithFatalHook(fatalHook{f}), zap.WithPanicHook(fatalHook{f}))
	}
	return zap.New(&slogCore{log: log}, opts...)
}

// fatalHook stops the goroutine that met the error, for ever: etcd counts on the process to end there, and were only the goroutine to end,
// its deferred calls would pull away what others of etcd's still use. Wait tells the owner, who ends the process.
type fatalHook struct{ f *failure }

func (h fatalHook) OnWrite(e *zapcore.CheckedEntry, fields []zapcore.Field) {
	msg := e.Message
	for _, f := range fields {
		if err, ok := f.Interface.(error); ok && f.Type == zapcore.ErrorType {
			msg += ": " + err.Error()
		}
	}
	h.f.set(errors.New(msg))
	select {}
}

type slogCore struct{ log *slog.Logger }

func (c *slogCore) level(l zapcore.Level) slog.Level {
	switch {
	case l < zapcore.WarnLevel:
		return slog.LevelDebug
	case l == zapcore.WarnLevel:
		return slog.LevelInfo
	}
	return slog.LevelError
}

func (c *slogCore) Enabled(l zapcore.Level) bool {
	return c.log.Enabled(context.Background(), c.level(l)) && (l > zapcore.DebugLevel)
}

func (c *slogCore) With(fields []zapcore.Field) zapcore.Core {
	return &slogCore{log: c.log.With(attrs(fields)...)}
}

func (c *slogCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c *slogCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	c.log.Log(context.Background(), c.level(e.Level), e.Message, attrs(fields)...)
	return nil
}

func (c *slogCore) Sync() error { return nil }

func attrs(fields []zapcore.Field) []any {
	enc := zapcore.NewMapObjectEncoder()
	out := make([]any, 0, len(fields))
	for _, f := range fields {
		f.AddTo(enc)
		if v, ok := enc.Fields[f.Key]; ok {
			out = append(out, slog.Any(f.Key, v))
		}
	}
	return out
}
