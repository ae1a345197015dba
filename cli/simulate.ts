// `npm run simulate`: `deployctl simulate` of this checkout.
import { main } from './main.ts'

await main(['simulate', ...process.argv.slice(2)])
